"""Prompt and answer as a model's chat template renders them, the same for learning and scoring.

What a model is asked is the template's generation prompt; what it learns to say is what the
template writes behind that prompt, up to and with the token that ends the turn. Where a template
renders an earlier answer differently once a later turn follows, each answer is rendered with the
conversation up to it alone, as it is when the model has to give it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lrmc_ray.chat.checks import check_answer, check_rendered, left_out, unrendered_fields
from lrmc_ray.chat.conversation import (
    Answer,
    Conversation,
    Message,
    Rendering,
    continue_block,
    forms_of_calls,
    opened_block,
)
from lrmc_ray.chat.ends import TurnEnds, shared_length
from lrmc_ray.chat.spoken import AnswerForm
from lrmc_ray.chat.template import PROBE, REFUSES, Template
from lrmc_ray.errors import DataError

RENDERING = 3
"""Changes whenever prompts or answers are rendered, or told from each other, in another way."""


class Chat(Template):
    """How one tokenizer renders conversations and the answers in them; see :class:`Template`."""

    def __init__(self, tokenizer: Any, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(tokenizer, options)
        self._ends = TurnEnds(self)
        self.unrendered: set[str] = set()
        """Fields of tools' results that the template left out, and that say nothing by themselves:
        results stand in the order of their calls."""
        self._left_out: dict[tuple[tuple[Any, ...], ...], int | None] = {}

    def last_header(self, prompt: str) -> int:
        """Where the last special token of ``prompt`` begins; see :class:`TurnEnds`."""
        return self._ends.last_header(prompt)

    def form(self, messages: Sequence[Message]) -> AnswerForm:
        """What the template writes around the text of the answer behind ``messages``.

        Raises:
            DataError: see :meth:`answer`.
        """
        answer = self.answer([*messages, {"role": "assistant", "content": PROBE[1]}])
        opening, _, closing = answer.text[: answer.end].partition(PROBE[1])
        return AnswerForm(answer.prompt, opening, closing, self.special, self.markers)

    def answer(
        self, messages: Sequence[Message], tools: Sequence[Any] = (), *, after: str | None = None
    ) -> Answer:
        """The last message, which is the assistant's, in the context of those before it.

        Args:
            messages: up to the answer.
            tools: that it may call.
            after: the rendering of ``messages``, where that is there already.

        Raises:
            DataError: the template does not render it behind its own generation prompt, or leaves
                out some of it, or see :meth:`render`.
        """
        if after is None:
            after = self.render(messages, tools)
        prompt, text = self._cut(messages, tools, after)
        end = self._ends.end_of(text, messages[-1])
        if end is None and (borrowed := self._ends.borrowed(messages[-1])):
            text, end = text + borrowed, len(text) + len(borrowed)
        if end is None:
            raise DataError(
                "an answer must end with a special token, this one ends with "
                f"{text[-20:]!r}: the model would not learn to stop; use a chat template that "
                "writes one, or a tokenizer with an eos token"
            )
        learned: tuple[tuple[int, int], ...] = ((0, end),)
        if self.marks_answers and after.startswith(prompt):
            learned = self.marked(messages, tools, len(prompt), len(prompt) + end)
        return Answer(prompt, text, end, learned)

    def _cut(
        self, messages: Sequence[Message], tools: Sequence[Any], after: str
    ) -> tuple[str, str]:
        """Generation prompt and answer; ``after`` is the rendering of both."""
        if len(messages) == 1:
            return self._cut_first(messages[0], tools, after)
        prompt = self.prompt(messages[:-1], tools)
        if after.startswith(prompt):
            return prompt, after[len(prompt) :]
        tags = opened_block(prompt)
        if tags is not None:
            head, _, blank = prompt.rpartition(tags[0])
            if after.startswith(head):
                return prompt, continue_block(after[len(head) :], messages[-1], tags, blank)
        common = shared_length(prompt, after)
        raise DataError(
            "the chat template must render an answer behind its generation prompt; the prompt ends "
            f"with {prompt[common:][-40:]!r}, where the answer is rendered behind "
            f"{after[common : common + 40]!r}; set model.template_options, or use a chat template "
            "that agrees with itself"
        )

    def _cut_first(self, message: Message, tools: Sequence[Any], after: str) -> tuple[str, str]:
        """The same where nothing precedes the answer: no template renders an empty conversation."""
        content = message.get("content")
        at = after.find(content.strip()) if isinstance(content, str) and content.strip() else -1
        question = [{"role": "user", "content": PROBE[0]}]
        try:
            asked = self.prompt(question, tools)
            header = asked.removeprefix(self.render(question, tools))
        except DataError:
            header = ""
        start = after.find(header) + len(header) if header and header in after else at
        if start < 0 or (at >= 0 and start > at):
            start = at
        if start < 0:
            raise DataError(
                "an answer that comes first must be rendered with its text, this one is not; put a "
                "user message before it"
            )
        return after[:start], after[start:]

    def renderings(self, conversation: Conversation) -> list[Rendering]:
        """The samples that a conversation is learned as, each answer once, in their order.

        One, unless the template renders an earlier answer differently once a later turn follows.

        Raises:
            DataError: the template does not render all that the messages hold, or see
                :meth:`answer`.
        """
        problems = []
        # Templates differ in what they take for a call's arguments and its lack of text.
        for form in (conversation, *forms_of_calls(conversation)):
            try:
                return self._renderings(form)
            except DataError as problem:
                problems.append(problem)
        raise next((p for p in problems if REFUSES not in str(p)), problems[0])

    def _first_left_out(self, messages: Sequence[Message], tools: Sequence[Any]) -> int | None:
        """Index of the first message that the template never renders among such roles."""
        shape = (
            *((m["role"], bool(m.get("content")), bool(m.get("tool_calls"))) for m in messages),
            (bool(tools),),
        )
        if shape not in self._left_out:
            self._left_out[shape] = left_out(messages, lambda others: self.render(others, tools))
        return self._left_out[shape]

    def _renderings(self, conversation: Conversation) -> list[Rendering]:
        messages, tools = conversation.messages, conversation.tools
        whole = self.render(messages, tools)
        check_rendered(conversation, whole, self._first_left_out(messages, tools))
        self.unrendered |= unrendered_fields(
            messages, whole, lambda others: self.render(others, tools)
        )
        if tools and whole == self.render(messages):
            raise DataError(
                "the chat template does not render 'tools'; use a model whose template does, or "
                "remove the field"
            )
        open_answers: list[Answer] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or index in conversation.unlearned:
                continue
            is_last = index == len(messages) - 1
            answer = self.answer(messages[: index + 1], tools, after=whole if is_last else None)
            check_answer(message, answer.prompt, answer.text)
            open_answers.append(answer)
        renderings: list[Rendering] = []
        while open_answers:
            last = open_answers[-1]
            text = last.prompt + last.text
            if whole.startswith(last.prompt + last.text[: last.end]):
                text = whole
            inside = [a for a in open_answers if text.startswith(a.prompt + a.text[: a.end])]
            open_answers = [a for a in open_answers if a not in inside]
            renderings.insert(0, Rendering(text, tuple(inside)))
        return renderings
