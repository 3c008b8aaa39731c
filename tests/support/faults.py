"""Kills at a point of the program, and damages of a file."""


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


def kill_at(monkeypatch, module, point, number=1):
    """Die when ``point`` is passed for the ``number``-th time."""
    seen = []

    def passed(name, note=""):
        seen.append(name)
        if seen.count(point) == number:
            raise Killed

    monkeypatch.setattr(module, "passed", passed)


def delete(path, _rng):
    path.unlink()


def empty(path, _rng):
    path.write_bytes(b"")


def halve(path, _rng):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lose_the_end(path, _rng):
    path.write_bytes(path.read_bytes()[:-2])


def flip_a_bit(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


DAMAGES = [delete, empty, halve, lose_the_end]
