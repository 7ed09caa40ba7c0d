"""What merging means, in plain loops: one sample at a time, every token kept, the dead ones masked.

The decoder is transformers' own with its own attention and a mask drawn here; decisions follow Eq. 1
and section 5 of the design word by word. Nothing of the package but the schedule's plain values comes in.
"""

import copy
import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from merging_cases import in_double, moving_pixels
from tiny_elva import END, FRAME, LINE, PATCH, START, embed_in_a_loop
from torch import nn
from transformers import AutoModelForCausalLM


@dataclass
class Patch:
    """One patch token: where it stands, and what it may merge with."""

    position: int
    video: int
    frame: int  # counted inside its video
    grid: tuple
    place: tuple
    tube: tuple = ()
    group: tuple = ()


@dataclass
class Run:
    """What the oracle found for one sample of `N` tokens.

    `hidden` holds what enters each layer and last the normalised end, each `(N, D)` with merged tokens reading their
    survivor. `survivors`, `sizes` and `links` have one entry per step, `alive` one per layer.
    """

    hidden: list
    logits: torch.Tensor
    survivors: list
    alive: list
    sizes: list
    links: list

    @property
    def tokens_per_layer(self):
        return [sum(alive) for alive in self.alive]

    @property
    def last_hidden_state(self):
        return self.hidden[-1]


class Oracle:
    """The plain text model with the weights of `model`, in float64, and its front end."""

    def __init__(self, model):
        config = copy.deepcopy(model.config.text_config)
        config._attn_implementation = "sdpa"
        self.text = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
        in_double(self.text)
        self.text.base_model.load_state_dict(model.model.language_model.state_dict())
        self.text.lm_head.load_state_dict(model.lm_head.state_dict())
        self.patch_embed = copy.deepcopy(model.model.patch_embed).double()
        self.config = model.config

    def gradients(self):
        """By the names they have in the model."""
        parts = {
            "model.language_model.": self.text.base_model,
            "lm_head.": self.text.lm_head,
            "model.patch_embed.": self.patch_embed,
        }
        return {
            prefix + name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for prefix, part in parts.items()
            for name, parameter in part.named_parameters()
        }

    def embed(self, ids, patches):
        """`(N, D)` embeddings of a sample."""
        ids = torch.tensor([ids])
        embeds = self.text.get_input_embeddings()(ids)[0]
        if patches is None:
            return embeds
        parts = embed_in_a_loop(self.patch_embed, patches, ids, self.config)
        where = [(ids[0] == token).nonzero()[:, 0] for token in (PATCH, FRAME, LINE)]
        return embeds.index_copy(0, torch.cat(where), torch.cat(parts))

    def sample(self, ids, schedule, seed=0, patches=None):
        """Run a sample of token ids with the pixels of `movie(ids, seed)`."""
        if patches is None:
            patches = moving_pixels(ids, seed)
        return self.run(self.embed(ids, patches), [(ids, self.resolve(schedule))])

    def turns(self, turns, patches):
        """Run turns one after another, `[(ids, schedule), ...]`: each merges its own videos by its own schedule."""
        ids = [token for part, _ in turns for token in part]
        return self.run(self.embed(ids, patches), [(part, self.resolve(schedule)) for part, schedule in turns])

    def resolve(self, schedule):
        return self.config.resolve_merge_schedule(schedule)

    def run(self, embeds, turns):
        """Run embeddings `(N, D)` of turns `[(ids, MergeSchedule), ...]`."""
        length = len(embeds)
        turns = [(find_patches(ids, start), schedule) for start, ids, schedule in starts(turns)]
        for patches, schedule in turns:
            cut(patches, schedule.window, schedule.max_run)
        decoder, hidden = self.text.base_model, embeds
        angles = decoder.rotary_emb(hidden[None], torch.arange(length)[None])
        alive, sizes, stands = length * [True], length * [1.0], list(range(length))
        found = Run([], None, [], [], [], [])
        for number, layer in enumerate(decoder.layers):
            for patches, schedule in turns:
                step = schedule.step_at(number)
                if step is None:
                    continue
                links = choose_links(hidden, patches, alive, step, schedule.ratio_of)
                hidden, sizes = apply(hidden, links, alive, sizes, stands, schedule.survivor)
                found.survivors.append(list(stands))
                found.links.append(len(links))
                found.sizes.append([size if living else 0 for size, living in zip(sizes, alive, strict=True)])
            found.hidden.append(hidden[stands])
            found.alive.append(list(alive))
            hidden = layer(hidden[None], attention_mask=self.mask(alive, number), position_embeddings=angles)
            hidden = (hidden[0] if isinstance(hidden, tuple) else hidden)[0]
        found.hidden.append(decoder.norm(hidden)[stands])
        found.logits = self.text.lm_head(found.hidden[-1])
        return found

    def mask(self, alive, layer):
        """`(1, 1, N, N)`: a token sees the living before it, and itself."""
        position = torch.arange(len(alive))
        ahead = position - position[:, None]
        window = self.text.config.sliding_window if self._slides(layer) else len(alive)
        allowed = torch.tensor(alive) & (ahead <= 0) & (ahead > -window)
        allowed = allowed | (ahead == 0)
        return allowed[None, None]

    def _slides(self, layer):
        types = getattr(self.text.config, "layer_types", None)
        if types is None:
            return getattr(self.text.config, "sliding_window", None) is not None
        return types[layer] == "sliding_attention"


def starts(turns):
    at = 0
    for ids, schedule in turns:
        yield at, ids, schedule
        at += len(ids)


def find_patches(ids, start=0):
    """Walk over the tokens of a turn and note every patch; frames and videos are counted in the turn."""
    patches, video, frame, pending = [], -1, -1, []
    for position, token in enumerate([*ids, END]):
        if token in (START, END, FRAME) and pending:
            rows = [row for row in pending if row]
            grid = (len(rows), len(rows[0]))
            for r, row in enumerate(rows):
                for c, at in enumerate(row):
                    patches.append(Patch(start + at, video, frame, grid, (r, c)))
            pending = []
        if token == START:
            video, frame = video + 1, -1
        elif token == FRAME:
            frame, pending = frame + 1, [[]]
        elif token == PATCH:
            pending[-1].append(position)
        elif token == LINE:
            pending.append([])
    return patches


def cut(patches, window, max_run):
    """Give each patch its tube and its ratio group: frame windows first, then blocks of `max_run` members."""
    members = {}
    for patch in patches:
        span = patch.frame // window if window else 0
        key = (patch.video, patch.grid, patch.place, span)
        number = members[key] = members.get(key, -1) + 1
        patch.tube = (*key, number // max_run if max_run else 0)
        patch.group = (patch.video, span)


def choose_links(hidden, patches, alive, step, ratio_of):
    """Pairs `(earlier, later)` of living neighbours of a tube that merge now."""
    tubes = {}
    for patch in patches:
        if alive[patch.position]:
            tubes.setdefault(patch.tube, []).append(patch)
    pairs = []
    for tube in tubes.values():
        for one, next_one in pairwise(tube):
            a, b = hidden[one.position].detach(), hidden[next_one.position].detach()
            similarity = min(1.0, float(a @ b / (a.norm() * b.norm())))
            pairs.append((similarity, one.position, next_one.position, one.group))
    if step.similarity_threshold is not None:
        return [(a, b) for similarity, a, b, _ in pairs if similarity > step.similarity_threshold]
    chosen = []
    for group in {patch.group for patch in patches}:
        of_group = [patch for patch in patches if patch.group == group]
        current = sum(alive[patch.position] for patch in of_group)
        base = current if ratio_of == "current" else len(of_group)
        floor = len({patch.tube for patch in of_group})
        keep = max(math.ceil(step.target_ratio * base - 1e-9), floor)
        ranked = sorted((pair for pair in pairs if pair[3] == group), key=lambda pair: -pair[0])
        chosen += [(a, b) for _, a, b, _ in ranked[: max(current - keep, 0)]]
    return chosen


def apply(hidden, links, alive, sizes, stands, survivor):
    """Merge runs of linked tokens into one of them; `alive` and `stands` change in place."""
    following = dict(links)
    heads = [a for a in following if a not in following.values()]
    hidden, sizes = hidden.clone(), list(sizes)
    old = hidden.clone()
    for head in heads:
        run = [head]
        while run[-1] in following:
            run.append(following[run[-1]])
        keeper = run[-1] if survivor == "last" else run[0]
        total = sum(sizes[i] for i in run)
        hidden[keeper] = sum(sizes[i] * old[i] for i in run) / total
        sizes[keeper] = total
        for i in run:
            alive[i] = i == keeper
        for i, stand in enumerate(stands):
            if stand in run:
                stands[i] = keeper
    return hidden, sizes


def cross_entropy(logits, labels):
    """Sum over supervised positions of `(N, V)` logits against the next of `(N,)` labels, and how many there are."""
    wanted = labels[1:]
    chosen = wanted != -100
    return nn.functional.cross_entropy(logits[:-1][chosen], wanted[chosen], reduction="sum"), int(chosen.sum())
