"""Exercises at the end of a notebook: an answer is checked, and a wrong one gets a hint.

An answer may be a number, a text, a tensor or a function. Each exercise is one entry of
`EXERCISES`; `close_to`, `text_is` and `returns` make the usual checks.

A score is kept only by those who ask for it: where the file `SHEET` lies in the working directory,
each checked answer is a line in it, and `scores` reads them. The checks hold what they expect:
they help those who learn, and are no secret from those who look.
"""

import html
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import binomtest

SHEET = "scores.jsonl"
Check = Callable[[object], bool]


@dataclass(frozen=True)
class Exercise:
    """``why`` follows a right answer, ``hint`` any other. A check may raise: that is not right."""

    check: Check
    why: str
    hint: str


@dataclass(frozen=True)
class Feedback:
    """What `check` says; ``right`` is None while there is no answer."""

    number: str
    right: bool | None
    text: str

    def __repr__(self) -> str:
        return f"{self.number}: {self.text}"

    def _repr_html_(self) -> str:
        return f"<p><b>{html.escape(self.number)}</b>: {html.escape(self.text)}</p>"


class Feedbacks(tuple[Feedback, ...]):
    """What `check_all` says, one line for each exercise, and each line as long as it is."""

    def __repr__(self) -> str:
        return "\n".join(map(repr, self))

    def _repr_html_(self) -> str:
        return "\n".join(feedback._repr_html_() for feedback in self)


def check(number: str, answer: object) -> Feedback:
    """Look at the answer to an exercise and say "not answered yet", "right", or give a hint.

    Where a score is kept (`keep_scores`), a right answer and a hint are noted.

    Raises:
        ValueError: there is no exercise of this number. An answer never makes it raise.

    >>> check("01.1", ...)
    01.1: not answered yet
    """
    if number not in EXERCISES:
        raise ValueError(f"there is no exercise {number!r}; known are {', '.join(EXERCISES)}")
    if answer is ...:
        return Feedback(number, None, "not answered yet")
    exercise = EXERCISES[number]
    try:
        right, trouble = bool(exercise.check(answer)), ""
    except Exception as error:  # whatever a learner's answer does, it gets a hint
        right, trouble = False, f" ({type(error).__name__}: {error})"
    _note(number, right)
    if right:
        return Feedback(number, True, f"right. {exercise.why}")
    return Feedback(number, False, f"not yet{trouble}. Hint: {exercise.hint}")


def check_all(answers: Mapping[str, object]) -> Feedbacks:
    """`check` the answers to several exercises, number -> answer.

    >>> check_all({"01.1": ..., "01.3": 1.82})
    01.1: not answered yet
    01.3: right. 1 / (0.4 + 0.6 / 4) is about 1.82: the part that did not get faster decides. This \
is Amdahl's law (1967).
    """
    return Feedbacks(check(number, answer) for number, answer in answers.items())


def keep_scores(folder: str | os.PathLike = ".") -> Path:
    """Begin a score sheet in a folder of notebooks; one that is there already goes on.

    Returns:
        the path of the sheet. Delete it to keep no score any more.
    """
    path = Path(folder) / SHEET
    path.touch()
    return path


def scores(folder: str | os.PathLike = ".") -> pd.DataFrame:
    """What the score sheet of a folder says, one row for each exercise.

    Args:
        folder: where the notebooks and the sheet are; of the exercises, those whose notebook is
            there as well are listed.

    Returns:
        ``right``: whether it was answered; ``hints``: how many hints were given until then;
        ``when``: the time of the right answer, or of the last hint, or nothing.

    Raises:
        FileNotFoundError: no score is kept there.
    """
    path = Path(folder) / SHEET
    if not path.is_file():
        raise FileNotFoundError(
            f"no score is kept in {path.parent.absolute()}; begin with exercises.keep_scores()"
        )
    present = {file.name[:2] for file in path.parent.glob("[0-9][0-9]_*.ipynb")}
    numbers = [number for number in EXERCISES if not present or number[:2] in present]
    found = {number: [False, 0, ""] for number in numbers}
    for number, right, when in filter(None, map(_noted, path.read_bytes().splitlines())):
        row = found.setdefault(number, [False, 0, ""])
        if not row[0]:  # what follows a right answer is play
            row[:] = [right, row[1] + (not right), when]
    frame = pd.DataFrame.from_dict(found, orient="index", columns=["right", "hints", "when"])
    return frame.sort_index().rename_axis("exercise")


def close_to(expected: object, *, relative: float = 0.01, absolute: float = 1e-9) -> Check:
    """The answer is a number, or an array, list or tensor of this shape, near ``expected``."""

    def close(answer: object) -> bool:
        found, wanted = _numbers(answer), _numbers(expected)
        return found.shape == wanted.shape and np.allclose(
            found, wanted, rtol=relative, atol=absolute
        )

    return close


def text_is(*expected: str) -> Check:
    """The answer is one of these texts; case, spaces, hyphens and underscores do not count."""

    def plain(text: str) -> str:
        return "".join(c for c in text.lower() if c not in " -_")

    return lambda answer: isinstance(answer, str) and plain(answer) in map(plain, expected)


def returns(cases: Iterable[tuple[Sequence, object]], *, relative: float = 1e-4) -> Check:
    """The answer is a function that gives ``result`` for ``arguments`` in each of the cases."""
    cases = list(cases)

    def works(answer: Callable) -> bool:
        return all(
            close_to(result, relative=relative)(answer(*arguments)) for arguments, result in cases
        )

    return works


def _note(number: str, right: bool) -> None:
    """Add a line to the score sheet, if there is one.

    A line is appended by one call, so several notebooks may share a sheet; and it begins with a
    line break, so that a line which was cut short (a full disk) spoils no other.
    """
    line = {"exercise": number, "right": right, "when": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"}
    try:
        sheet = os.open(SHEET, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(sheet, f"\n{json.dumps(line)}\n".encode())
        finally:
            os.close(sheet)
    except FileNotFoundError:
        pass
    except OSError as error:  # the answer matters more than the score
        warnings.warn(f"the score sheet could not be written: {error}", stacklevel=3)


def _noted(line: bytes) -> tuple[str, bool, str] | None:
    """What a line of the score sheet says; None for one that is empty, cut short or foreign."""
    try:
        values = json.loads(line)
        number, right, when = values["exercise"], values["right"], values["when"]
        return (number, right, when) if number in EXERCISES and right in (True, False) else None
    except (ValueError, KeyError, TypeError):
        return None


def _numbers(value: object) -> np.ndarray:
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    if isinstance(value, (tuple, list)):
        value = [_numbers(item) for item in value]
    return np.asarray(value, dtype=float)


def _uint8_grid(low: float, high: float) -> tuple[float, int]:
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255
    return scale, round(-low / scale)


def _warm_up_and_cosine(step: int, steps: int) -> float:
    done = step / steps
    return 10 * done if done < 0.1 else (1 + math.cos(math.pi * (done - 0.1) / 0.9)) / 2


def _mcnemar(b: int, c: int) -> float:
    return float(binomtest(b, b + c).pvalue)


def _largest(values: torch.Tensor) -> torch.Tensor:
    """All but the largest value set to 0."""
    return torch.where(values.abs() == values.abs().max(), values, 0)


_CANDIDATES = [
    {"name": "float32", "loss": 0.0, "size_bytes": 400, "latency_ms": 4.0},
    {"name": "int8", "loss": 0.005, "size_bytes": 100, "latency_ms": 1.0},
    {"name": "tiny", "loss": 0.2, "size_bytes": 60, "latency_ms": 0.5},
]  # of exercise 13.3
EXERCISES = {
    "00.1": Exercise(
        close_to(77_754 * 4 / 8, relative=0.001),
        why="Two weights share a byte. The real file is larger: it also holds scales, biases, "
        "batch norms and a header.",
        hint="a byte has 8 bits.",
    ),
    "00.2": Exercise(
        text_is("convolution", "convolutions", "convolutional", "conv", "conv2d"),
        why="Dynamic kernels exist for products of matrices, that is for linear and recurrent "
        "layers; a convolution needs ranges that are known beforehand.",
        hint="look at the column `type` of compress.coverage(int8_dynamic).",
    ),
    "01.1": Exercise(
        close_to(math.ceil(0.9 * 0.1 * 1.96**2 / 0.005**2), relative=0.1),
        why="p (1 - p) · 1.96² / 0.005² is about 13,830: even 10,000 test images leave an "
        "uncertainty of ±0.6 points.",
        hint="half of the interval is 1.96 · sqrt(p (1 - p) / n); set it to 0.005 with p = 0.9 "
        "and solve for n.",
    ),
    "01.2": Exercise(
        returns([((b, c), _mcnemar(b, c)) for b, c in ((10, 10), (15, 5), (5, 15), (60, 31))]),
        why="Only disagreements count, and under the hypothesis each is the toss of a coin.",
        hint="of b + c tosses of a fair coin, how likely is a result at least as far from the "
        "middle as b? binomtest(b, b + c).pvalue answers that.",
    ),
    "01.3": Exercise(
        close_to(1 / (0.4 + 0.6 / 4)),
        why="1 / (0.4 + 0.6 / 4) is about 1.82: the part that did not get faster decides. This is "
        "Amdahl's law (1967).",
        hint="let the whole take 1. What does the fast part take now, and what the rest?",
    ),
    "02.1": Exercise(
        returns(
            [(bounds, _uint8_grid(*bounds))
             for bounds in ((-1.0, 3.0), (-0.3, 0.1), (-5.0, 5.5), (0.5, 2.0), (-4.0, -1.0))]
        ),
        why="The range is stretched to hold 0, cut into 255 steps, and 0 lands on a code of its "
        "own: zero padding and ReLU stay exact.",
        hint="first stretch the range so that 0 lies in it: low = min(low, 0), high = max(high, "
        "0). The scale is (high - low) / 255, and the zero point, an integer, is the code of 0.",
    ),
    "02.2": Exercise(
        close_to(64 * 64 * 4 / 8 + 64 * 64 / 32 * 4, relative=0.001),
        why="2,048 bytes of codes and 512 of scales: five bits a weight, not four.",
        hint="count the codes first (4 bits each), then one scale of 4 bytes for every 32 weights.",
    ),
    "02.3": Exercise(
        close_to(1 / (1 / 4 + 1 / 2)),
        why="1 / (1/4 + 1/2) is 1.33; on a smaller layer, where rounding takes longer than the "
        "product, int8 is slower.",
        hint="let the float32 layer take 1. The product now takes 1/4; add the rounding.",
    ),
    "03.1": Exercise(
        returns(
            [((torch.tensor(w), a), torch.nn.functional.softshrink(torch.tensor(w), a))
             for w, a in (([-1.0, -0.2, 0.0, 0.2, 1.0], 0.5), ([0.3, -0.3], 0.3), ([-2.0], 0.0))]
        ),
        why="The sign stays, the size goes down by alpha, and never below 0.",
        hint="sign(w) times the larger of |w| - alpha and 0; clamp(min=0) does the latter.",
    ),
    "03.2": Exercise(
        close_to(1 / 3),
        why="32 bits for every weight against 48 for each that is left: the density must be below "
        "32/48, so the sparsity above 1/3. With 32 bits for a position it would be 1/2.",
        hint="of n weights, d n are left. Compare 32 n bits with (32 + 16) d n, and solve for "
        "1 - d.",
    ),
    "03.3": Exercise(
        close_to(1 / 4),
        why="Half of the inputs times half of the outputs. Only the first convolution, whose "
        "inputs are the image, keeps half.",
        hint="a convolution of k x k multiplies each of its outputs by k * k * input channels.",
    ),
    "04.1": Exercise(
        returns(
            [((torch.tensor(logits), t), torch.softmax(torch.tensor(logits) / t, 0))
             for logits, t in (([4.0, 2.0, 0.0], 1), ([4.0, 2.0, 0.0], 4), ([-3.0, 5.0], 0.5),
                               ([1000.0, 990.0, 0.0], 2))]
        ),
        why="A high temperature brings the probabilities together and keeps their order.",
        hint="divide by the temperature before the exponential. Large logits overflow: take the "
        "largest away from all of them first, which changes nothing else.",
    ),
    "04.2": Exercise(
        returns([(shape, (math.prod(shape) - 1) // sum(shape))
                 for shape in ((2048, 2048), (2048, 784), (784, 2048), (10, 2048), (4, 4))]),
        why="r (m + n) < m n. For a square layer the rank must be under half of its width.",
        hint="two thin layers have r (m + n) weights. Fewer means fewer: at 4 x 4, rank 2 takes "
        "just as many as the layer.",
    ),
    "04.3": Exercise(
        close_to((100 / 50) ** 2),
        why="In the limit the divergence is the mean squared difference of the centred logits, "
        "divided by 2 T²; the factor T² is there to undo that.",
        hint="divide both sides of the limit by T². What does doubling T do to it?",
    ),
    "05.1": Exercise(
        close_to(-0.9 * math.log2(0.9) - 0.1 * math.log2(0.1 / 15)),
        why="0.9 · 0.152 for the zeros and 0.1 · log2(15 / 0.1) for the others: 0.86 bits, less "
        "than the one bit that a code for each symbol cannot do without.",
        hint="each of the 15 values has probability 0.1 / 15; sum -p log2 p over all 16 symbols.",
    ),
    "05.2": Exercise(
        lambda answer: all(
            [tuple(pair) for pair in answer(list(symbols))] == pairs
            for symbols, pairs in (
                ("aab", [("a", 2), ("b", 1)]), ("", []), ("abab", [(c, 1) for c in "abab"]),
                ([0, 0, 0, 7, 0], [(0, 3), (7, 1), (0, 1)]),
            )
        ),
        why="itertools.groupby does it too. On dense weights, every run has length 1.",
        hint="begin a new pair where a symbol differs from the one before; think of no symbols.",
    ),
    "05.3": Exercise(
        close_to(40 // 8 + 1, relative=1e-9),
        why="A filler covers eight zeros: seven as its gap and the one that it stores as a value. "
        "Five of them cover all 40, and the value itself has the gap 0.",
        hint="the longest gap of 3 bits is 7, and the filler after it is a zero itself.",
    ),
    "06.1": Exercise(
        close_to(24, relative=1e-9),
        why="The pair moves as one: four things have 4! = 24 orders.",
        hint="take pruning and fine-tuning as one step; how many orders have four steps?",
    ),
    "06.2": Exercise(
        close_to((4, 2), relative=1e-9),
        why="It loses 0.2 + 0.6 = 0.8 points; (3, 3) loses 1.3 and (2, 4) loses 5.2. The layer "
        "that can stand least gets most.",
        hint="6,000 bits for 2,000 weights allow (2, 4), (3, 3) and (4, 2). Add up the losses.",
    ),
    "06.3": Exercise(
        close_to(0.4, relative=0.001),
        why="1.1 - (0.4 + 0.3): what the sum of the single losses does not explain.",
        hint="if they did not interact, both together would cost the sum.",
    ),
    "07.1": Exercise(
        close_to(8 * 34 / 0.2),
        why="1,360 Mbit/s: 34 MB take 0.2 s there. On a slower line they take longer.",
        hint="at which rate do the megabytes that are saved take as long as the decoding?",
    ),
    "07.2": Exercise(
        close_to(1.5),
        why="Half a file for nothing, then all of it. Resumed, it would be sent once.",
        hint="on average, where does the line break? What has been sent until then is lost.",
    ),
    "07.3": Exercise(
        lambda answer: all(
            answer(old, new, size) == count
            for old, new, size, count in (
                (b"aabbcc", b"aabbcc", 2, 0), (b"aabbcc", b"ccaabb", 2, 0),
                (b"aabbcc", b"xaabbcc", 2, 4), (b"", b"abc", 2, 2), (b"aabb", b"aaxb", 2, 1),
            )
        ),
        why="One byte at the front moves all borders, and every chunk is new: that is why the "
        "chunks of a manifest begin anew with each tensor.",
        hint="cut both into chunks and keep those of the old one in a set; the last may be short.",
    ),
    "08.1": Exercise(
        close_to((1 + math.sqrt(0.9)) / (1 - math.sqrt(0.9)), relative=0.03),
        why="About 38. In a gentler valley momentum swings where a plain step arrives.",
        hint="set the two parts that a step leaves equal, (k - 1) / (k + 1) = sqrt(0.9), and solve "
        "for k.",
    ),
    "08.2": Exercise(
        close_to(7 * (4 + 4 + 2 * 4), relative=0.01),
        why="112 GB, four times the weights alone: half of it is the optimizer's.",
        hint="count 4 bytes for each weight, for each gradient, and for each number that AdamW "
        "keeps; the table of rules says how many those are.",
    ),
    "08.3": Exercise(
        returns([((step, steps), _warm_up_and_cosine(step, steps))
                 for step, steps in ((0, 100), (5, 100), (10, 100), (55, 100), (7, 30), (9, 9))]),
        why="Large steps are safe only once the weights have left their random start, and small "
        "ones at the end let the noise of the batches average out.",
        hint="before a tenth: step / (steps / 10). After it, (1 + cos(pi * x)) / 2, where x goes "
        "from 0 to 1 over the other nine tenths.",
    ),
    "09.1": Exercise(
        close_to(150),
        why="2 * 3/4 * 100 MB. With more ranks it comes to twice the gradients, and no more.",
        hint="a ring passes three of four pieces on while they are summed, and three sums after.",
    ),
    "09.2": Exercise(
        close_to(8 * 15 / 0.01),
        why="12,000 Mbit/s: within a data centre packing may take longer than it saves.",
        hint="two ranks each send what there is. At which rate do 15 MB take 10 ms?",
    ),
    "09.3": Exercise(
        lambda answer: all(
            close_to(sent)(answer([torch.tensor(g) for g in gradients], compress))
            for gradients, compress, sent in (
                ([[1.0, 4.0], [2.0, 1.0], [0.0, 0.0]], _largest, [[0, 4], [3, 0], [0, 1]]),
                ([[0.4], [0.4], [0.4]], torch.round, [[0], [1], [0]]),
                ([[2.0, -3.0]], torch.zeros_like, [[0, 0]]),
            )
        ),
        why="All that was sent, and what still waits, is the sum of the gradients.",
        hint="keep what was not sent, the tensor less what compress gave, and add it to the next.",
    ),
    "10.1": Exercise(
        close_to(63, relative=1e-9),
        why="7 / (m + 7) is at most a tenth from m = 63 on. With two stages a rank, half of that "
        "would do.",
        hint="set (p - 1) / (m + p - 1) to 0.1 with p = 8, and solve for m.",
    ),
    "10.2": Exercise(
        lambda answer: all(
            list(answer(p, m)) == [min(m, p - r) for r in range(p)]
            for p, m in ((4, 8), (4, 16), (4, 2), (1, 5), (3, 3))
        ),
        why="The first rank is p micro-batches ahead of their return, the last one only one: its "
        "forward pass is followed by its own backward pass.",
        hint="how many micro-batches can rank r send off until the first comes back to it? There "
        "may be fewer micro-batches than ranks.",
    ),
    "10.3": Exercise(
        close_to(4 * 24 * 4 * 2048 * 4096 * 2 / 1e9),
        why="6.4 GB a step, twice in each block in each direction: a matter for the links within "
        "one machine.",
        hint="four sums a block, each of B T D numbers of two bytes.",
    ),
    "11.1": Exercise(
        close_to(100 / 70),
        why="One worker needs 100; two need 20 for the stem and 50 for the longer branch.",
        hint="how long is the longest way from the input to the output?",
    ),
    "11.2": Exercise(
        returns([
            (([5, 3, 2, 2], 2), 7), (([3, 3, 2, 2, 2], 2), 7), (([4], 3), 4), (([1, 1, 1], 3), 1),
            (([2, 7, 4, 3, 6], 3), 8),
        ]),
        why="For 3, 3, 2, 2, 2 it gives 7, though 6 is possible: the rule is quick, and at most a "
        "third above the best (Graham, 1969).",
        hint="sort from large to small; give each to the worker whose sum is smallest.",
    ),
    "11.3": Exercise(
        close_to(1_050_624 / (2 * 512)),
        why="1,026 examples. Below that, the outputs of the branches are less to send than the "
        "gradients of all weights.",
        hint="a batch of B sends 2 * 512 * B values; when is that 1,050,624?",
    ),
    "12.1": Exercise(
        close_to(9, relative=1e-6),
        why="A batch of 9 has 4.5 / (1 + 18 / 2048) = 4.46 FLOPs for each byte, one of 8 has 3.97.",
        hint="set 2 B n² / (4 (n² + 2 B n)) to 100 / 25. B must be whole, and just above.",
    ),
    "12.2": Exercise(
        returns([
            ((0.3, 4, 2), 0.25), ((0.375, 4, 2), 0.5), ((-0.375, 4, 2), -0.25), ((5.0, 4, 2), 1.75),
            ((-5.0, 4, 2), -2.0), ((100.0, 8, 10), 100.0), ((0.01, 8, -2), 0.009765625),
        ]),
        why="Two's complement reaches one step further down than up, so 1.75 is the largest of "
        "fixed<4,2>, and -2 the smallest.",
        hint="a step is 2 ** (integer - bits); the codes go from -(2 ** (bits - 1)) to "
        "2 ** (bits - 1) - 1, and floor(x / step + 0.5) rounds halves up.",
    ),
    "12.3": Exercise(
        close_to(12.1),
        why="1,210 cycles of 10 nanoseconds. With a multiplier for each product it would be a few "
        "cycles, on a chip a thousand times as large.",
        hint="how many products does each multiplier do, one after the other? A cycle takes "
        "1 / (100 MHz).",
    ),
    "13.1": Exercise(
        close_to(0.09),
        why="9 of 10,000 images count differently at most: 0.09 points, whatever the accuracy.",
        hint="an image with the same answer counts the same in both.",
    ),
    "13.2": Exercise(
        close_to(80 / 2.75),
        why="About 29: beyond it, the phone takes longer than way and data centre together.",
        hint="solve 3 c = 80 + c / 4.",
    ),
    "13.3": Exercise(
        lambda answer: all(
            answer(_CANDIDATES, loss, size_bytes) == name
            for loss, size_bytes, name in (
                (1, 1e9, "tiny"), (0.01, 1e9, "int8"), (0.01, 50, None), (0, 1e9, "float32"),
                (0.01, 100, "int8"),
            )
        ),
        why="Limits first, then speed: that is all that `best` does with its table.",
        hint="keep the rows within both limits; if none is left, the answer is None.",
    ),
    "14.1": Exercise(
        close_to(4_000),
        why="125 batches a second: four times the images that one by one would give.",
        hint="how many batches fit into a second?",
    ),
    "14.2": Exercise(
        close_to(40),
        why="Little's law (1961): those in a system are its throughput times the time that each "
        "spends there, whatever happens inside.",
        hint="64 clients are there at any moment, and 1,600 leave in a second.",
    ),
    "14.3": Exercise(
        returns([
            (([0, 0, 0], 1, 2), [True, True, False]),
            (([0, 0.5, 1.0, 1.5, 2.0], 1, 1), [True, False, True, False, True]),
            (([0, 10, 10, 10], 1, 2), [True, True, True, False]),
            (([5.0, 5.25, 5.5, 5.75], 2, 1), [True, False, True, False]),
        ]),
        why="A refused request takes no token, so a client that is refused is not punished for "
        "asking again.",
        hint="tokens = min(burst, tokens + rate * time since the last request); one is taken "
        "where there is at least one.",
    ),
    "15.1": Exercise(
        close_to(11_842_536),
        why="the scales are one byte in a hundred. Left in float32, the table would be more than "
        "four times as large as everything else in int8.",
        hint="384 bytes and one float32 for each row.",
    ),
    "15.2": Exercise(
        close_to(2),
        why="five values are left, -2 to 2: this channel of an int8 layer has less than 3 bits.",
        hint="the largest channel has 127 steps on each side.",
    ),
    "15.3": Exercise(
        returns([
            (([[1, 2, 0], [3, 1, 2]], [[0, 5, 1], [1, 2, 0]]), 0.5),
            (([[1, 2]], [[10, 20]]), 1),
            (([[0, 1], [0, 1], [1, 0], [1, 0]], [[1, 0], [1, 0], [0, 1], [3, 0]]), 0.25),
        ]),
        why="this is the agreement: it needs no labels, and sees no answer that was wrong before.",
        hint="find the place of the largest number of each row, before and after.",
    ),
    "16.1": Exercise(
        close_to(4, relative=1e-9),
        why="of two that lose the same the larger file is beaten: (55, 0.9) by (50, 0.9).",
        hint="one is beaten if another is no larger, loses no more, and is better in one of them.",
    ),
    "16.2": Exercise(
        close_to(1.342),
        why="so 500 examples cannot tell a loss of one point from none; the pairs of answers of "
        "two models on the same examples tell more.",
        hint="p is 0.9 and n is 500; a point is one hundredth.",
    ),
    "16.3": Exercise(
        lambda answer: all(
            answer(candidates, size_bytes, lost) == name
            for candidates, size_bytes, lost, name in (
                ([("a", 60, 0.4), ("b", 50, 0.9), ("c", 80, 0.3)], 70, 1.0, "a"),
                ([("a", 60, 0.4), ("b", 50, 0.4)], 60, 0.4, "b"),
                ([("b", 50, 0.4), ("a", 60, 0.4)], 60, 0.4, "b"),
                ([("a", 60, 0.4), ("b", 50, 0.9)], 50, 0.5, None),
                ([], 50, 0.5, None),
            )
        ),
        why="limits first, then the order: a search does the same with more candidates.",
        hint="drop what is too large or loses too much; then compare (points lost, bytes).",
    ),
}  # fmt: skip
