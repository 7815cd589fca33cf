"""The embedded default task: a two-digit calculator's tape.

A problem is a start value and keys pressed in order, evaluated left to right, the display wrapping
at 100. Prompt ``37+8*3-15\\n``. A solution line is ``x op y=z``, a short cut ``x op y op y=z`` or a
restatement ``=z``; the last line is ``A<z>``. Truth is known for every line, so
:meth:`Tape.slips` can say where a solution first goes wrong, and how.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from pav.tasks.base import Grade, Problem, Split, Task, problem_id, split_of

# Not typing's: jsonargparse would run that block, and --help would wait for its imports.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Endless streams of problems and solutions differ by split and use, never by time.
_STREAM_SEED = {"train": 1, "validation": 2, "test": 3, "solutions": 4}
_OPERATION = re.compile(r"([+*-])(\d{1,2})", re.ASCII)
_LINE = re.compile(r"(\d{1,2})((?:[+*-]\d{1,2}){1,2})=(\d{1,2})", re.ASCII)
_RESTATEMENT = re.compile(r"=(\d{1,2})", re.ASCII)
_ANSWER = re.compile(r"A(\d{1,2})", re.ASCII)

Operation = tuple[str, int]


def apply(value: int, op: str, operand: int) -> int:
    """One key press on a display of two digits."""
    if op == "+":
        return (value + operand) % 100
    if op == "-":
        return (value - operand) % 100
    return (value * operand) % 100


def parse(question: str) -> tuple[int, list[Operation]]:
    """Start value and operations of a prompt such as ``37+8*3-15``."""
    head = re.match(r"\d+", question)
    if head is None:
        raise ValueError(f"not a tape problem: {question!r}; expected e.g. '37+8*3-15'")
    return int(head[0]), [(op, int(y)) for op, y in _OPERATION.findall(question[head.end() :])]


def value_of(question: str) -> int:
    """The display at the end of the tape."""
    value, operations = parse(question)
    for op, operand in operations:
        value = apply(value, op, operand)
    return value


def draw_question(rng: Random, n_ops: int, keys: str = "++--*") -> str:
    """A random problem; operations are drawn from ``keys``."""
    text = str(rng.randint(2, 99))
    for _ in range(n_ops):
        op = rng.choice(keys)
        text += op + str(rng.randint(2, 9 if op == "*" else 29))
    return text


def _solution(rng: Random, question: str, short_cuts: float) -> str:
    """A correct solution; one line in ten restates, a share of them take two operations at once."""
    value, operations = parse(question)
    lines: list[str] = []
    i = 0
    while i < len(operations):
        u = rng.random()
        if u < 0.10:
            lines.append(f"={value}")
            continue
        take = 2 if u < 0.10 + short_cuts and i + 1 < len(operations) else 1
        line = str(value)
        for op, operand in operations[i : i + take]:
            line += f"{op}{operand}"
            value = apply(value, op, operand)
        lines.append(f"{line}={value}")
        i += take
    lines.append(f"A{value}")
    return "\n".join(lines)


@dataclass(frozen=True)
class Tape(Task):
    """The calculator tape.

    Args:
        n_ops: operations in a problem, the difficulty knob.
        sft_ops: smallest and largest number of operations in the solutions ``pav.sft`` learns from.
        sft_short_cuts: share of lines of those solutions that take two operations at once.
        sft_keys: the operations of those problems are drawn from this string.
    """

    answer_tags: ClassVar[tuple[str, str]] = ("A", "")

    n_ops: int = 8
    sft_ops: tuple[int, int] = (2, 9)
    sft_short_cuts: float = 0.15
    sft_keys: str = "++--*"

    def problems(self, split: Split) -> Iterator[Problem]:
        """Distinct problems of ``split``; endless for ``n_ops`` of 3 and more."""
        rng = Random(f"{_STREAM_SEED[split]}/{self.n_ops}")
        seen: set[str] = set()
        while True:
            question = draw_question(rng, self.n_ops)
            pid = problem_id(question)
            if pid not in seen and split_of(pid) == split:
                seen.add(pid)
                yield Problem(id=pid, question=question, gold=str(value_of(question)))

    def solutions(self, seed: int) -> Iterator[tuple[str, str]]:
        """Endless (question, correct solution) pairs of the train split, one stream per seed."""
        rng = Random(f"{_STREAM_SEED['solutions']}/{seed}")
        while True:
            question = draw_question(rng, rng.randint(*self.sft_ops), self.sft_keys)
            if split_of(problem_id(question)) == "train":
                yield question, _solution(rng, question, self.sft_short_cuts)

    def grade(self, text: str, problem: Problem) -> Grade:
        """Right iff the last line is ``A<z>`` with the value of the tape."""
        match = _ANSWER.fullmatch(text.rsplit("\n", 1)[-1])
        if match is None:
            return Grade(answer=None, correct=False)
        answer = str(int(match[1]))
        return Grade(answer=answer, correct=answer == problem.gold)

    def length_cap(self, longest_prompt: int) -> int:
        """Of prompt and solution together, as the shipped labels and verifiers have it."""
        return 160

    def forced_answer(self, problem: Problem) -> str:
        """The last line of a right solution."""
        return f"A{problem.gold}"

    def slips(self, steps: list[str], problem: Problem) -> list[str | None]:
        """Kind of the first slip up to and including each step; None while there is none.

        Kinds: ``result +-`` and ``result *`` (a one-operation line with a wrong result),
        ``short cut`` (a two-operation line with a wrong result), ``copy`` (a wrong left operand),
        ``operation`` (keys that do not come next), ``restatement``, ``answer`` (a wrong or early
        last line), ``form`` (no such line).
        """
        value, operations = parse(problem.question)
        done, first, kinds = 0, None, []
        for step in steps:
            if first is None:
                first, value, done = _check(step.strip("\n"), value, done, operations)
            kinds.append(first)
        return kinds


def _check(
    line: str, value: int, done: int, operations: list[Operation]
) -> tuple[str | None, int, int]:
    """(kind of slip or None, value after the line, operations done after it)."""
    if match := _RESTATEMENT.fullmatch(line):
        return (None if int(match[1]) == value else "restatement"), value, done
    if match := _ANSWER.fullmatch(line):
        right = int(match[1]) == value and done == len(operations)
        return (None if right else "answer"), value, done
    match = _LINE.fullmatch(line)
    if match is None:
        return "form", value, done
    if int(match[1]) != value:
        return "copy", value, done
    pressed = [(op, int(y)) for op, y in _OPERATION.findall(match[2])]
    if pressed != operations[done : done + len(pressed)]:
        return "operation", value, done
    for op, operand in pressed:
        value = apply(value, op, operand)
    if int(match[3]) == value:
        return None, value, done + len(pressed)
    kind = "short cut" if len(pressed) == 2 else f"result {'*' if pressed[0][0] == '*' else '+-'}"
    return kind, value, done


def tape_tokenizer() -> PreTrainedTokenizerFast:
    """Character tokenizer of the tape: PAD, BOS, EOS and 16 characters."""
    return word_tokenizer("0123456789+-*=A\n", r"[\s\S]")


def word_tokenizer(words: Iterable[str], pattern: str) -> PreTrainedTokenizerFast:
    """PAD, BOS, EOS and ``words``, into which ``pattern`` cuts a text; what is no word is PAD."""
    # Not at the top: every command knows this task.
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "<s>", "</s>", *words]
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
