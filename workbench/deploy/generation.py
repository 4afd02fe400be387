"""Text from a model of characters, one symbol at a time.

The model takes codes (1, T) with T fixed by its export, and gives logits (1, T, symbols). It is
causal, so what stands behind the last known symbol changes nothing, and the text is padded there.
Each symbol is a request like any other: those of several texts share batches.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import numpy as np

from workbench.deploy.protocol import Refused, Signature

MOST_SYMBOLS = 1000  # of one answer


async def generate(
    text: str,
    symbols: Sequence[str],
    context: int,
    compute: Callable[[np.ndarray], Awaitable[np.ndarray]],
    *,
    most: int = 50,
    temperature: float = 1.0,
    seed: int = 0,
) -> AsyncIterator[str]:
    """Continue a text, symbol by symbol.

    Args:
        text: to go on from; of more than ``context`` symbols, the last count.
        symbols: what code stands for which.
        compute: codes (1, context) -> logits (1, context, symbols).
        most: how many symbols.
        temperature: 0 takes the likeliest symbol each time; 1 draws as the model says.

    Raises:
        Refused: the model does not know a symbol of ``text``, or there is none.
    """
    code_of = {symbol: code for code, symbol in enumerate(symbols)}
    unknown = sorted(set(text) - set(code_of))
    if unknown or not text:
        raise Refused(422, f"text_input has {unknown[:5]!r}; the model knows {''.join(symbols)!r}")
    codes = [code_of[symbol] for symbol in text]
    draw = np.random.default_rng(seed)
    for _ in range(most):
        known = codes[-context:]
        padded = np.zeros((1, context), np.int64)  # (1, T)
        padded[0, : len(known)] = known
        logits = (await compute(padded))[0, len(known) - 1].astype(np.float64)  # (symbols,)
        if temperature == 0:
            code = int(logits.argmax())
        else:
            odds = np.exp((logits - logits.max()) / temperature)
            code = int(draw.choice(len(odds), p=odds / odds.sum()))
        codes.append(code)
        yield symbols[code]


def text_model(signature: Signature, record: dict) -> tuple[Sequence[str], int]:
    """Symbols and context of a model of characters. Raises `Refused` if it is none."""
    labels, (first, *more) = record.get("labels") or [], signature.inputs
    outputs = signature.outputs
    one = not more and len(outputs) == 1
    if not (
        one
        and labels
        and first.dtype == "int64"
        and len(first.shape) == 2
        and len(outputs[0].shape) == 3
        and all(len(label) == 1 for label in labels)
    ):
        raise Refused(422, "the model is none of characters: it writes no text")
    return labels, first.shape[1] if first.shape[1] > 0 else 128
