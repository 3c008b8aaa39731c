"""One model that answers questions, in the form that it was taught."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil

from lrmc_ray.chat.answers import Chat
from lrmc_ray.chat.conversation import Message
from lrmc_ray.chat.spoken import AnswerForm, Spoken
from lrmc_ray.chat.template import special_tokens
from lrmc_ray.chat.tokens import bare_ids
from lrmc_ray.cluster.resources import local_cpus
from lrmc_ray.models.loading import load_model, load_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

MEASURE_SECONDS = 0.1
"""How long it is looked at what others compute, before each answer."""

Dtype = Literal["float32", "bf16"]


@dataclass(frozen=True)
class Generation:
    """How answers are written."""

    max_new_tokens: int = 256
    """Most tokens of an answer."""
    temperature: float = 0.0
    """0 takes the most probable token; above 0 it is drawn."""
    top_p: float = 1.0
    """Probability of the tokens that are drawn from."""
    seed: int = 0
    """Of what is drawn; every answer begins with it anew."""

    def options(self) -> dict[str, Any]:
        """What ``generate`` of transformers is given, in place of the model's own settings."""
        drawn: dict[str, Any]
        if self.temperature == 0.0:
            drawn = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        else:
            drawn = {"do_sample": True, "temperature": self.temperature}
            drawn |= {"top_p": self.top_p, "top_k": 0}
        return {"max_new_tokens": self.max_new_tokens, **drawn}


@dataclass(frozen=True)
class Written:
    """What a model answered."""

    text: str
    is_cut: bool = False
    """Whether it would have gone on behind ``max_new_tokens``."""

    def shown(self) -> str:
        """The answer, with a mark where it is cut."""
        return f"{self.text.strip()} [...]" if self.is_cut else self.text.strip()


def idle_cores() -> int:
    """Cores that nobody else uses now, at least one.

    A token is some hundred small steps, each of which waits for the last of its threads. With one
    thread more than there are idle cores that takes several times as long as with a single thread.
    """
    busy_percent: float = psutil.cpu_percent(interval=MEASURE_SECONDS)
    return max(1, round(local_cpus() * (1.0 - busy_percent / 100.0)))


class _Watched:
    """Tells what is written so far; a streamer of transformers, which puts the prompt first."""

    def __init__(self, told: Callable[[list[int]], None]) -> None:
        self._told, self._ids = told, list[int]()
        self._is_prompt = True

    def put(self, ids: "Tensor") -> None:
        if not self._is_prompt:
            self._ids += ids.flatten().tolist()
            self._told(self._ids)
        self._is_prompt = False

    def end(self) -> None:
        """Nothing is kept back."""


class Answerer:
    """A model and its tokenizer, on the GPU where there is one."""

    def __init__(
        self,
        directory: Path,
        *,
        template_options: Mapping[str, Any] | None = None,
        dtype: Dtype = "float32",
        as_text: bool = False,
    ) -> None:
        """Load the model.

        Args:
            directory: of the model.
            template_options: what its chat template is given besides the messages.
            dtype: in which it computes.
            as_text: give it the question as it is, without template.

        Raises:
            DataError: transformers cannot load it, or the template does not know an option.
        """
        import torch

        self.directory = directory
        self._tokenizer = load_tokenizer(directory)
        self._chat = Chat(self._tokenizer, template_options)
        self._special = set(special_tokens(self._tokenizer))
        self._as_text = as_text
        self._most_threads = torch.get_num_threads()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        kind = torch.bfloat16 if dtype == "bf16" else torch.float32
        self._model = load_model(directory, dtype=kind).to(device)

    def answer(
        self,
        messages: Sequence[Message],
        generation: Generation,
        watch: Callable[[str], None] | None = None,
    ) -> Written:
        """The answer to the last of ``messages``, without reasoning before it.

        Args:
            messages: the conversation.
            generation: how the answer is written.
            watch: is given the answer so far, after every token.

        Raises:
            DataError: the chat template refuses the messages.
        """
        import torch

        form = None if self._as_text else self._chat.form(messages)
        if form is None:
            ids = list(self._tokenizer(str(messages[-1]["content"]))["input_ids"])
        else:
            ids = bare_ids(self._tokenizer, form.prompt)
        ends = self._ends(form)
        if self._model.device.type == "cpu":
            torch.set_num_threads(min(self._most_threads, idle_cores()))
        ids_BT = torch.tensor([ids], device=self._model.device)
        streamer = watch and _Watched(lambda new: watch(self._spoken(new, form).text))
        torch.manual_seed(generation.seed)
        with torch.inference_mode():
            written_BT = self._model.generate(
                input_ids=ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                eos_token_id=sorted(ends),
                pad_token_id=min(ends, default=0),
                streamer=streamer,
                **generation.options(),
            )
        new: list[int] = written_BT[0, len(ids) :].tolist()
        is_cut = len(new) >= generation.max_new_tokens and new[-1] not in ends
        while new and new[-1] in ends:
            new.pop()
        return Written(self._spoken(new, form).text, is_cut)

    def _ends(self, form: AnswerForm | None) -> set[int]:
        """Tokens that end an answer: the model's, the tokenizer's, and that of the turn."""
        own = self._model.generation_config.eos_token_id
        ends = {self._tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
        if form is not None:
            closing = bare_ids(self._tokenizer, form.closing)
            ends |= set(closing[:1]) & self._special
        return ends - {None}

    def _spoken(self, ids: Sequence[int], form: AnswerForm | None) -> Spoken:
        if form is None:
            return Spoken(self._tokenizer.decode(ids, skip_special_tokens=True))
        return form.spoken(self._tokenizer.decode(ids, skip_special_tokens=False))
