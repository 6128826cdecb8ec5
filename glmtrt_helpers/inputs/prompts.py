"""The prompt of a chat, as upstream's `chat` writes it."""

from collections.abc import Sequence

from glmtrt_helpers.checkpoints.tokenizer import Tokenizer


def chat_prompt(tokenizer: Tokenizer, query: str, history: Sequence[tuple[str, str]] = ()) -> list[int]:
    """Ids of a chat prompt: the raw query, or the numbered rounds where there is a history."""
    if not history:
        return tokenizer.encode(query)
    rounds = "".join(f"[Round {i}]\n问：{q}\n答：{a}\n" for i, (q, a) in enumerate(history))
    return tokenizer.encode(f"{rounds}[Round {len(history)}]\n问：{query}\n答：")
