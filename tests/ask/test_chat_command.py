"""``lrmc chat``: the answers are those of transformers, whatever way they are asked for."""

import io
import json
import os
import re
import shutil
import signal
import sys
from html.parser import HTMLParser

import pytest
import torch
from rich.console import Console

from lrmc_ray.ask import command
from lrmc_ray.ask.answering import Answerer, Generation, Written
from lrmc_ray.ask.questions import read_questions
from lrmc_ray.ask.table import Row
from lrmc_ray.ask.terminal import growing, show
from lrmc_ray.config import RunSettings
from lrmc_ray.console import run_command
from lrmc_ray.errors import DataError, IncompleteArtifactError
from lrmc_ray.files import fault_points
from lrmc_ray.files.origin import origin_of, write_origin
from lrmc_ray.models.forward import hidden_states
from lrmc_ray.models.loading import load_model, load_tokenizer
from tests.support.tiny import make_model

QUESTION = "What is <b>2</b> | 3?"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, tiny_model):
    """Another random model, which says that the first one is its base."""
    directory = make_model(tmp_path_factory.mktemp("chat") / "tuned", seed=1)
    settings = RunSettings.model_validate(
        {"model": {"name": str(tiny_model)}, "data": {"train": "gone.jsonl"}}
    )
    write_origin(directory, origin_of(settings, directory.parent))
    return directory


def by_transformers(directory, question, *, chat=True, **options):
    """What the library's own generate answers, by the lines that the model card shows."""
    tokenizer, model = load_tokenizer(directory), load_model(directory)
    if chat:
        messages = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    else:
        inputs = tokenizer(question, return_tensors="pt")
    torch.manual_seed(5)
    given = {"do_sample": False, "max_new_tokens": 12} | options
    written = model.generate(input_ids=inputs["input_ids"], **given)
    ids = written[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def asked(*argv, stdin="", monkeypatch=None):
    if monkeypatch is not None:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    return run_command(command.main, [str(one) for one in argv])


def test_greedy_answers_are_those_of_transformers(tuned, tiny_model, monkeypatch, capsys):
    lines = f"{QUESTION}\n\nName a city.\n"
    argv = (tuned, "--max-new-tokens", 12, "--json")
    assert asked(*argv, stdin=lines, monkeypatch=monkeypatch) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["models"] == [f"base: {tiny_model}", f"tuned: {tuned}"]
    assert [row["question"] for row in said["rows"]] == [QUESTION, "Name a city."]
    for row in said["rows"]:
        expected = [by_transformers(one, row["question"]) for one in (tiny_model, tuned)]
        assert [answer.removesuffix("[...]").strip() for answer in row["answers"]] == expected
        assert expected[0] != expected[1]


def test_drawn_answers_and_plain_text_are_those_of_transformers(tuned):
    generation = Generation(12, temperature=0.8, top_p=0.9, seed=5)
    answerer = Answerer(tuned, as_text=True)
    messages = [{"role": "user", "content": QUESTION}]
    options = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 0}
    expected = by_transformers(tuned, QUESTION, chat=False, **options)
    for _ in range(2):  # the seed begins anew with every answer
        assert answerer.answer(messages, generation).text.strip() == expected
    greedy = answerer.answer(messages, Generation(12)).text.strip()
    assert greedy == by_transformers(tuned, QUESTION, chat=False) != expected


def test_a_model_without_a_template_is_asked_in_the_plain_format(tiny_model, tmp_path):
    directory = shutil.copytree(tiny_model, tmp_path / "model")
    (directory / "chat_template.jinja").unlink()
    prompt = f"User:\n{QUESTION}\n\nAssistant:\n"
    messages = [{"role": "user", "content": QUESTION}]
    written = Answerer(directory).answer(messages, Generation(12))
    assert written.text.strip() == by_transformers(directory, prompt, chat=False)


def test_an_answer_ends_with_its_turn(tmp_path):
    """The model's own settings name no end; the template's turn has one."""
    directory = make_model(tmp_path / "model", tied=False)
    model, tokenizer = load_model(directory), load_tokenizer(directory)
    messages = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        hidden_D = hidden_states(model, ids)[0, -1]
        model.lm_head.weight.zero_()
        model.lm_head.weight[tokenizer.convert_tokens_to_ids("<|im_end|>")] = hidden_D
    for config in (model.config, model.generation_config):
        config.eos_token_id = None
    model.save_pretrained(directory)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "!"}))
    assert Answerer(directory).answer(messages, Generation(5)) == Written("")


def test_an_answer_that_is_cut_is_marked(tuned):
    messages = [{"role": "user", "content": QUESTION}]
    written = Answerer(tuned).answer(messages, Generation(3))
    assert written.is_cut
    assert written.shown() == f"{written.text.strip()} [...]"


def test_both_columns_fit_80_columns_and_do_not_act_on_the_terminal(tuned, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert asked(tuned, "--max-new-tokens", 40, stdin=f"{QUESTION}\x1b[2J\n",
                 monkeypatch=monkeypatch) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert f"> {QUESTION}" in said
    assert max(map(len, said.splitlines())) <= 80
    header = next(line for line in said.splitlines() if "base: " in line)
    assert "tuned: " in header


def test_an_answer_is_shown_while_it_is_written(tuned, monkeypatch):
    """What is seen grows by one token at a time, and ends as the answer."""
    messages = [{"role": "user", "content": QUESTION}]
    seen: list[str] = []
    written = Answerer(tuned).answer(messages, Generation(12), seen.append)
    assert seen[-1] == written.text
    assert len(seen) == 12
    for number, text in enumerate(seen, 1):
        assert text == Answerer(tuned).answer(messages, Generation(number)).text


def seen_on(written):
    """The lines that a terminal shows: line feeds, and cursor up and erasures are obeyed."""
    lines, at = [""], 0
    for part in re.findall(r"\x1b\[[?\d;]*[a-zA-Z]|[\r\n]|[^\x1b\r\n]+", written):
        if part == "\n":
            at += 1
            lines += [""] * (at == len(lines))
        elif part == "\x1b[1A":
            at -= 1
        elif part == "\x1b[2K":
            lines[at] = ""
        elif part[0] not in "\x1b\r":
            lines[at] += part
        else:
            assert part == "\r" or part[-1] in "mhl", repr(part)
    return [line.rstrip() for line in lines]


@pytest.mark.parametrize("width", [80, 40])
def test_growing_answers_leave_nothing_but_the_last_ones(width):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=width, markup=False)
    row = Row("Which?", None, ("left", "right"))
    with growing(console, ("base", "tuned")) as (first, second):
        assert first is not None
        assert second is not None
        first("le")
        second("\x1b[2Jri")
        first("left")
    grown = screen.getvalue()
    assert "\x1b[2J" not in grown
    assert "�[2Jri" in grown
    show(console, row, ("base", "tuned"))
    alone = io.StringIO()
    show(Console(file=alone, width=width), row, ("base", "tuned"))
    assert [line for line in seen_on(screen.getvalue()) if line] == [
        line.rstrip() for line in alone.getvalue().splitlines() if line.strip()
    ]


def test_without_a_terminal_nothing_grows():
    screen = io.StringIO()
    with growing(Console(file=screen), ("base", "tuned")) as watches:
        assert watches == [None, None]
    assert screen.getvalue() == ""


class Cells(HTMLParser):
    """The texts of a table's cells, as a browser reads them."""

    def __init__(self):
        super().__init__()
        self.rows, self.tags = [], set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.rows and self.rows[-1] and data.strip():
            self.rows[-1][-1] += data


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "q.jsonl"
    rows = [
        {"prompt": QUESTION, "completion": "<script>5</script>"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                      {"role": "user", "content": "line 1\nline 2"}]},
        {"question": "How many?", "answer": 6},
        "Bare?",
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def test_html_escapes_everything(tuned, questions, tmp_path, capsys):
    page = tmp_path / "out.html"
    assert asked(tuned, "--questions", questions, "--to", page, "--max-new-tokens", 12) == 0
    assert "4 questions and their answers are in" in capsys.readouterr().out
    cells = Cells()
    cells.feed(page.read_text())
    assert not cells.tags & {"script", "b"}
    assert cells.rows[0][:2] == ["question", "expected"]
    assert cells.rows[1][:2] == [QUESTION, "<script>5</script>"]
    assert cells.rows[1][3].removesuffix("[...]").strip() == by_transformers(tuned, QUESTION)
    assert [row[1] for row in cells.rows[2:]] == ["", "6", ""]


def test_markdown_keeps_one_line_a_question(tuned, questions, tmp_path):
    table = tmp_path / "out.md"
    assert asked(tuned, "--questions", questions, "--to", table, "--max-new-tokens", 12) == 0
    lines = table.read_text().splitlines()
    assert lines[0].startswith("Greedy answers of at most 12 tokens")
    assert len(lines) == 4 + 4
    assert lines[4].startswith(r"| What is &lt;b&gt;2&lt;/b&gt; \| 3? | &lt;script&gt;5")
    assert "| line 1<br>line 2 |" in lines[5]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "q.jsonl:1 must be JSON"),
        ("\n[1]", "q.jsonl:2 must be a text, or have messages, prompt or question"),
        ('{"messages": [{"role": "user"}]}', "every message must have role and content"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "must end with a question"),
        ("", "must hold questions"),
    ],
)
def test_a_question_that_is_none_is_named(tmp_path, content, problem):
    path = tmp_path / "q.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=problem):
        read_questions(path)


def test_plain_text_has_one_question_a_line(tmp_path):
    path = tmp_path / "q.txt"
    path.write_text('One?\n\n  {"prompt": "x"}\n')
    assert [one.text for one in read_questions(path)] == ["One?", '{"prompt": "x"}']
    with pytest.raises(IncompleteArtifactError, match="there is no"):
        read_questions(tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("argv", "code", "problem"),
    [
        (["nowhere"], 3, "nowhere does not exist; give the directory of a tuned model"),
        (["MODEL", "--to", "x.md"], 2, "--to x.md needs --questions FILE"),
        (["MODEL", "--questions", "Q", "--to", "x.pdf"], 2, "--to must end in .md or .html"),
        (["MODEL", "--temperature", "9"], 2, "--temperature must be from 0 to 5, got 9.0"),
        (["MODEL", "--max-new-tokens", "0"], 2, "--max-new-tokens must be at least 1, got 0"),
        (["MODEL", "--questions", "none"], 3, "--questions must be a file, there is no none"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tuned, questions, capsys, argv, code, problem):
    words = {"MODEL": str(tuned), "Q": str(questions)}
    assert asked(*(words.get(word, word) for word in argv)) == code
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert problem in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_without_a_base_one_model_answers(tiny_model, monkeypatch, capsys):
    argv = (tiny_model, "--max-new-tokens", 12)
    assert asked(*argv, stdin=f"{QUESTION}\n", monkeypatch=monkeypatch) == 0
    said = capsys.readouterr()
    assert "--compare BASE asks one beside it" in said.err
    shown = said.out.replace("\n", "").replace(" ", "")
    assert by_transformers(tiny_model, QUESTION).replace("\n", "").replace(" ", "") in shown


def test_a_killed_chat_leaves_no_table(tuned, questions, tmp_path):
    page = tmp_path / "out.html"
    pid = os.fork()
    if pid == 0:
        try:
            fault_points._FAULT = "chat.answered:kill:1"
            fault_points._passes.clear()
            asked(tuned, "--questions", questions, "--to", page, "--max-new-tokens", 2)
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q.jsonl"]


@pytest.mark.parametrize(("busy_percent", "threads"), [(0.0, 8), (49.0, 4), (90.0, 1), (100.0, 1)])
def test_answers_take_the_threads_that_others_leave(tiny_model, monkeypatch, busy_percent, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    monkeypatch.setattr("lrmc_ray.ask.answering.local_cpus", lambda: 8)
    monkeypatch.setattr("psutil.cpu_percent", lambda interval: busy_percent)
    try:
        answerer = Answerer(tiny_model)
        for _ in range(2):  # a busy moment does not last
            answerer.answer([{"role": "user", "content": "x"}], Generation(2))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_no_more_threads_are_taken_than_were_given(tiny_model, monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr("lrmc_ray.ask.answering.local_cpus", lambda: 8)
    monkeypatch.setattr("psutil.cpu_percent", lambda interval: 0.0)
    try:
        Answerer(tiny_model).answer([{"role": "user", "content": "x"}], Generation(2))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
