"""The tiny checkpoint's tokenizer: byte-level BPE whose merges spell exactly the toy world's words.

256 bytes come first, so any text round-trips and there is no unknown token. Then one merge after the other until each
answer word is one token, with and without a space before it, and each question word is one token. Nothing is counted
on a corpus, so every build gives the same vocabulary.
"""

from itertools import pairwise

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from elva_hf.data.toy_world import vocabulary

SPECIAL_TOKENS: tuple[str, ...] = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<video>",
    "<FRAME>",
    "<LINE>",
    "<image>",
)
CHAT_WORDS: tuple[str, ...] = ("user", "assistant", "system")  # follow <|im_start|> with no space
SPACE = "Ġ"  # byte-level BPE writes a space so


def build_toy_tokenizer(*, max_length: int = 2048) -> PreTrainedTokenizerFast:
    """Build the tokenizer: the BPE vocabulary, then `SPECIAL_TOKENS` in their order.

    Padding is `<|endoftext|>`, on the left; the end of a turn, `<|im_end|>`, is the end of a sequence. The chat
    template is not set here.

    Args:
        max_length: `model_max_length` of the tokenizer, in tokens.
    """
    merges = _merges()
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in merges]
    bpe = models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens=[token for token in SPECIAL_TOKENS if token not in ("<|endoftext|>", "<|im_end|>")],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )


def _merges() -> list[tuple[str, str]]:
    """Merges, most urgent first.

    A later merge never undoes an earlier word: every step of that word ranks before it.
    """
    answers, asked = vocabulary()
    opening = [word for word in asked if word[0].isupper()]  # questions open with these: no space before
    spaced = [SPACE + word for word in (*answers, *asked) if word not in opening]
    merges: list[tuple[str, str]] = []
    for word in (*answers, *CHAT_WORDS, *opening, *spaced):
        pieces = _apply(word, {pair: rank for rank, pair in enumerate(merges)})
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = ["".join(pieces[:2])]
    return merges


def _apply(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Split a word as BPE does: of all neighbouring pairs, the one of lowest rank merges first."""
    pieces = list(word)
    while known := [(ranks[pair], place) for place, pair in enumerate(pairwise(pieces)) if pair in ranks]:
        _, place = min(known)
        pieces[place : place + 2] = ["".join(pieces[place : place + 2])]
    return pieces
