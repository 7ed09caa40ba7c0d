"""Direct preference optimisation: an answer that is preferred to another, for the same videos and question.

A pair is a row with `independent_turns` and two turns that ask the same, the preferred answer first:

    {"id": "7", "independent_turns": true, "messages": [
        {"role": "user", "content": [{"type": "video", "path": "7.mp4"}, {"type": "text", "text": "What happens?"}]},
        {"role": "assistant", "content": "A red ball rolls in, then a blue one."},
        {"role": "user", "content": "What happens?"},
        {"role": "assistant", "content": "A blue ball rolls in, then a red one."}]}

Packed with a shared prefix the video is decoded, encoded and read once for both answers. Letters: `B` pairs, `N`
tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elva_hf.data.collator import ElvaCollator
from elva_hf.data.encoding import EncodedSample, encode_row
from elva_hf.data.packing import IGNORED
from elva_hf.errors_elva import ConfigurationError, ElvaError
from elva_hf.training.trainer import ElvaTrainer


class PreferenceLoss(NamedTuple):
    """What a batch of pairs gives.

    Args:
        loss: Mean over the pairs.
        rewards: `(B, 2)` implicit rewards of the preferred and of the other answer, without gradient.
    """

    loss: Tensor
    rewards: Tensor


def dpo_loss(policy: Tensor, reference: Tensor, beta: float) -> PreferenceLoss:
    """The standard loss of DPO: how surely the policy tells the answers apart, measured from the reference.

    Args:
        policy: `(B, 2)` log-probabilities of the preferred and of the other answer.
        reference: `(B, 2)` the same by the model before training.
        beta: How far the policy may go from the reference.
    """
    rewards = beta * (policy - reference)
    return PreferenceLoss(-F.logsigmoid(rewards[:, 0] - rewards[:, 1]).mean(), rewards.detach())


def pair_log_probs(logits: Tensor, labels: Tensor, segment_ids: Tensor) -> Tensor:
    """Log-probabilities of the two answers of each row, summed over their tokens.

    Args:
        logits: `(B, N, V)` of the tokens before those of `labels`.
        labels: `(B, N)` -100 where there is no answer.
        segment_ids: `(B, N)` 1 for the preferred answer, 2 for the other.

    Returns:
        `(B, 2)` float32 (float64 for float64).
    """
    learned = labels != IGNORED
    scores = logits if logits.dtype == torch.float64 else logits.float()
    each = scores.log_softmax(-1).gather(-1, labels.masked_fill(~learned, 0)[..., None])[..., 0] * learned
    return torch.stack([(each * (segment_ids == answer)).sum(1) for answer in (1, 2)], 1)


class PreferenceTrainer(ElvaTrainer):
    """`ElvaTrainer` with the loss of DPO, on batches of `ElvaCollator(packing="shared_prefix")` whose rows are pairs.

    Args:
        *args: Of `ElvaTrainer`.
        beta: See `dpo_loss`.
        reference: The model before training; a frozen copy of the model if None, or, of a model with LoRA, the model
            without its adapters.
        **kwargs: Of `ElvaTrainer`.

    Raises:
        ConfigurationError: The model has a teacher's guidance, which DPO does not go with.
    """

    loss_is_scaled_for_ga = False  # a mean over the pairs of a micro-batch

    def __init__(self, *args: Any, beta: float = 0.1, reference: nn.Module | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self._guidance is not None:
            raise ConfigurationError("preferences are learnt without guidance; call set_guidance(None) first.")
        self.beta = beta
        if reference is None and not hasattr(self.model, "disable_adapter"):
            reference = copy.deepcopy(self.model)
        if reference is not None:
            reference = self.accelerator.prepare_model(reference.eval(), evaluation_mode=True)
        self.reference = reference
        self._rewards: list[Tensor] = []

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """The loss of a batch of pairs."""
        policy = self._answers(model, inputs)
        with torch.no_grad(), nullcontext() if self.reference is not None else self.model.disable_adapter():
            reference = self._answers(self.reference or model, inputs)
        loss, rewards = dpo_loss(policy, reference, self.beta)
        self._rewards.append(rewards)
        return (loss, {"rewards": rewards}) if return_outputs else loss

    def _answers(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        labels, segments = inputs["labels"], inputs.get("segment_ids")
        check_pairs(labels, segments)
        columns = (labels[:, 1:] != IGNORED).any(0).nonzero().squeeze(1)
        others = {name: value for name, value in inputs.items() if name not in ("labels", "sample_ids")}
        logits = model(**others, use_cache=False, logits_to_keep=columns).logits
        return pair_log_probs(logits, labels[:, columns + 1], segments[:, columns + 1])

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As `ElvaTrainer`'s, with the mean margin of the rewards and the share of pairs told apart."""
        if "loss" in logs and self._rewards:
            margins = torch.cat(self._rewards).diff(dim=1).neg()
            logs["reward_margin"] = round(float(margins.mean()), 6)
            logs["reward_accuracy"] = round(float((margins > 0).float().mean()), 4)
            self._rewards.clear()
        super().log(logs, *args, **kwargs)


def check_pairs(labels: Tensor, segment_ids: Tensor | None) -> None:
    """Refuse rows that are no pairs.

    Raises:
        ConfigurationError: A row has not exactly two answers.
    """
    answers = torch.zeros(len(labels), 1) if segment_ids is None else segment_ids.amax(1, keepdim=True)
    learned = labels != IGNORED
    has_both = segment_ids is not None and all(
        bool((learned & (segment_ids == answer)).any(1).all()) for answer in (1, 2)
    )
    if not has_both or bool((answers != 2).any()):
        raise ConfigurationError(
            "a row of preferences has one question twice, with independent_turns and data.packing=shared_prefix: first "
            "the preferred answer, then the other."
        )


class PairedCollator:
    """Batches of pairs as TRL's `DPOTrainer` takes them: all preferred answers, then all others, each with its video.

    Use `remove_unused_columns=False` and a dataset whose rows are pairs. `PreferenceTrainer` costs half of it, as it
    reads each video once.

    Args:
        processor: Of the model.
        **options: Of the video processor.
    """

    def __init__(self, processor: Any, **options: Any):
        self.processor, self.options = processor, options
        self._collate = ElvaCollator(processor, **options)

    def __call__(self, rows: Sequence[EncodedSample | Mapping[str, Any]]) -> dict[str, Tensor]:
        """Make a batch.

        Args:
            rows: Pairs, encoded or not.

        Returns:
            `input_ids`, `attention_mask`, `completion_mask`, each `(2 * B, N)`, and `pixel_values_videos`.

        Raises:
            ElvaError: A row is no pair.
        """
        pairs = []
        for row in rows:
            sample = row if isinstance(row, EncodedSample) else encode_row(row, self.processor, **self.options)
            answers = sample.unpack()
            if len(answers) != 2:
                raise ElvaError(f"a pair has two answers to one question; row {sample.sample_id!r} has {len(answers)}.")
            pairs.append(answers)
        batch = self._collate([pair[answer] for answer in (0, 1) for pair in pairs])
        batch["completion_mask"] = (batch.pop("labels") != IGNORED).long()
        return batch
