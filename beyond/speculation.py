"""Speculative decoding (Section 3.1, limitations): a small base drafts what a big one will say, both guided alike.

    python sample.py --base tiny-l --speculate 4

In the residual scheme z_delta depends on the text alone. What drafting computed of it serves the big base
too, which reads several drafted tokens in one pass, while the value network reads none again. Text comes
out as sample.generate would write it, says tests/test_decoding.py: greedy, the same tokens; sampled, from
the same distribution (Leviathan et al. 2023; Chen et al. 2023).
"""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from data.errors import UsageError
from data.tokenizer import is_same_family, load_tokenizer
from model import Llama
from sample import Guided, MappedGuided, check_prompts, draw, probabilities, refuse_nan, uniform


class Speculative:
    """A guided base whose tokens are drafted `ahead` at a time, by a small base with the same value network.

    Of the drafted tokens those before the first rejected one stand, and one is drawn in that one's place.

    ValueError for a scheme that reads the base's logits, for a vocabulary map, and for a draft of too few tokens.
    """

    def __init__(self, guided: Guided, draft: Llama, ahead: int):
        if isinstance(guided, MappedGuided):
            raise ValueError(
                "through a vocabulary map, tokens are not the base's, so it cannot verify several in one pass"
            )
        scheme = getattr(guided.value, "scheme", "residual")
        if scheme != "residual":
            raise ValueError(
                f"a {scheme} reads the base's logits, so what it says beside the drafting base is not what it says "
                "beside the big one, and nothing of drafting could be used again; a residual one can speculate"
            )
        self.guided, self.ahead = guided, ahead
        kind = type(guided)  # plain or fast
        self.drafting = kind(draft, guided.value, guided.alpha, guided.readable)
        self.verifying = kind(guided.base)
        if self.drafting.readable < guided.readable:
            raise ValueError(
                f"the drafting base reads {self.drafting.readable} tokens, and the other one {guided.readable}"
            )
        self.tried, self.accepted = (
            [0] * ahead,
            [0] * ahead,
        )  # drafted tokens that came to a verdict, by position
        self.rounds = 0

    @property
    def base(self) -> Llama:
        return self.guided.base

    @property
    def llamas(self) -> list[Llama]:
        return [*self.guided.llamas, self.drafting.base]

    @property
    def acceptance(self) -> list[float]:
        """The share of drafted tokens that stood, of those that came to a verdict, for each position of a round."""
        return [ours / tried if tried else 0.0 for ours, tried in zip(self.accepted, self.tried)]

    def start(self, prompt: list[int], max_new_tokens: int) -> Tensor:
        self.drafting.start([prompt], max_new_tokens)
        return self.verifying.start([prompt], max_new_tokens)  # (1, 1)

    def round(
        self, last: Tensor, noise: Tensor, ahead: int, temperature: float, top_p: float
    ) -> list[int]:
        """The next tokens, 1 to `ahead` of them, behind `last` (1, 1), with noise (2, ahead + 1) to draft by and to judge by."""
        length, V = self.verifying.caches[0].used, self.guided.readable
        # the small base drafts, guided
        tokens, z_delta, q = [last], [], []
        for index in range(ahead):
            z = self.drafting.step(tokens[-1])[:, -1, :V]  # (1, V)
            q.append(probabilities(z, temperature, top_p))
            if self.guided.value is not None:
                z_delta.append(self.drafting.z_delta.clone())  # the next step may write over it
            tokens.append(draw(q[-1], noise[0, index : index + 1])[:, None])
        q, drafted = torch.cat(q), torch.cat(tokens[1:])  # (ahead, V), (ahead, 1)
        # the big base reads all of it in one pass; z_delta is known
        z_base = self.verifying.step(torch.cat(tokens[:-1], dim=1))  # (1, ahead, Vb)
        z_post = self.guided.post(z_base, torch.cat(z_delta, dim=1) if z_delta else None)  # Eq. (3)
        refuse_nan(self.verifying, z_post)
        refuse_nan(self.drafting, q)
        p = probabilities(z_post[0, :, :V], temperature, top_p)  # (ahead, V)
        # a drafted token stands with probability min(1, p / q), and those behind the first that does not are lost
        stands = noise[1, :ahead, None] * q.gather(-1, drafted) < p.gather(-1, drafted)
        count = stands.cumprod(0).sum()
        # in that one's place comes a token that the draft offered too rarely
        row = count.clamp(max=ahead - 1)
        rest = (p[row] - q[row]).clamp(min=0)
        rest = torch.where(rest.sum() > 0, rest, p[row])  # p = q but for rounding
        instead = draw(rest[None], noise[1, -1:])
        count, *said = torch.cat(
            (count[None], drafted[:, 0], instead)
        ).tolist()  # the only word from device to host
        # forget in all caches what was rejected, and keep the books
        for cache in [*self.drafting.caches, *self.verifying.caches]:
            cache.crop(length + min(count + 1, ahead))
        self.rounds += 1
        for index in range(min(count + 1, ahead)):
            self.tried[index] += 1
            self.accepted[index] += index < count
        return said[:count] + said[-1:] if count < ahead else said[:count]


@torch.inference_mode()
def speculate(
    speculative: Speculative,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    stop_ids: set[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """sample.generate by speculation, one prompt after the other."""
    check_prompts(prompts)
    outputs: list[list[int]] = [[] for _ in prompts]
    for row, (prompt, output) in enumerate(zip(prompts, outputs)):
        noise = uniform(seed, row, max_new_tokens, 2, speculative.ahead + 1).to(
            speculative.base.device
        )
        last = speculative.start(prompt, max_new_tokens)  # (1, 1)
        while len(output) < max_new_tokens and not (output and output[-1] in stop_ids):
            ahead = min(speculative.ahead, max_new_tokens - len(output))
            for token in speculative.round(last, noise[len(output)], ahead, temperature, top_p):
                output.append(token)
                if on_token:
                    on_token(row, token)
                if token in stop_ids:
                    break
            last = torch.tensor([output[-1:]], device=last.device)
    return outputs


class Passes(NamedTuple):
    """Seconds that parts of decoding take."""

    read: float  # a prompt, by base and value network
    read_to_speculate: float  # and by the drafting base
    plain: float  # a guided token
    drafted: float  # a drafted one
    verified: float  # the big base's pass over as many as are drafted at a time


@torch.inference_mode()
def measure_passes(speculative: Speculative, prompt: list[int], repeats: int = 15) -> Passes:
    """Medians, each part by itself, of a prompt and what is right behind it."""
    ahead, guided = speculative.ahead, speculative.guided
    seconds = Passes([], [], [], [], [])

    def take(taken: list[float], part: Callable[[], Tensor]) -> None:
        started = time.perf_counter()
        part().max().item()  # waits for a GPU
        taken.append(time.perf_counter() - started)

    for _ in range(repeats + 2):  # the first two warm up
        take(seconds.read, lambda: guided.start([prompt], ahead + 1))
        take(seconds.read_to_speculate, lambda: speculative.start(prompt, ahead + 1))
        last = torch.tensor([prompt[-1:]], device=speculative.base.device)
        noise = torch.zeros(1, device=last.device)
        for taken, system, tokens in (
            (seconds.plain, guided, last),
            (seconds.drafted, speculative.drafting, last),
            (seconds.verified, speculative.verifying, last.expand(1, ahead)),
        ):
            take(taken, lambda: draw(probabilities(system.step(tokens)[:, -1], 0.0, 1.0), noise))
    return Passes(*(sorted(taken[2:])[repeats // 2] for taken in seconds))


def predicted_speed_up(lengths: list[int], acceptance: list[float], passes: Passes) -> float:
    """How many times as fast speculation should write answers of these lengths as plain guided decoding does."""
    round_seconds = len(acceptance) * passes.drafted + passes.verified
    plain = sum(passes.read + length * passes.plain for length in lengths)
    return plain / sum(
        passes.read_to_speculate + expected_rounds(length, acceptance) * round_seconds
        for length in lengths
    )


def expected_rounds(length: int, acceptance: list[float]) -> float:
    """Rounds that an answer of `length` tokens takes, where the draft at each position of a round stands with its acceptance.

    A round brings j tokens when j - 1 stand and the next does not, or all of them: 1 + a_1 + a_1 a_2 + ... in the mean,
    less what it drafts beyond the answer's end.
    """
    ahead = len(acceptance)
    reaches = [math.prod(acceptance[:count]) for count in range(ahead)] + [
        0.0
    ]  # that a round brings more than so many
    rounds = [0.0]  # for 0, 1, ... tokens
    for n in range(1, length + 1):
        # the first round brings j of them
        behind = [
            (reaches[j - 1] - reaches[j]) * rounds[n - j] for j in range(1, min(n, ahead) + 1)
        ]
        rounds.append(1 + sum(behind))
    return rounds[length]


# ---------------------------------------------------------------------------------------------------------
# On the command line


def speculating(plugged, args):
    """The guided speaker of a run.plug.Plugged, with a small base to draft for it."""
    from dataclasses import replace

    from run.plug import find_base, refuse_value_network

    path = plugged.own_path
    if args.draft is not None:
        path = find_base(args.draft, plugged.own_path, {"bases": [str(plugged.own_path)]})
    refuse_value_network("--draft", path)
    guided = plugged.guided.guided
    if not isinstance(guided, MappedGuided) and not is_same_family(
        plugged.guided.tokenizer, load_tokenizer(path)
    ):
        raise UsageError(
            f"--draft {path}: it has another tokenizer than {plugged.base_path}, for which it would have to draft"
        )
    draft = Llama.from_pretrained(path, guided.base.dtype, guided.base.device)
    try:
        system = Speculative(guided, draft, args.speculate)
    except ValueError as error:
        raise UsageError(f"--speculate: {error}") from None
    return replace(plugged.guided, guided=system, generate=speculate)


def compare_with_plain(plugged, texts: list[str], args) -> None:
    """Answer plainly and by speculation, say how both went, and whether it paid."""
    from run.show import prepare

    plain, speaker = plugged.guided, speculating(plugged, args)
    asked = [prepare(speaker, [("user", text)], args) for text in texts]
    passes = measure_passes(speaker.guided, asked[0][0])  # a warm-up, too
    seconds = {"plain": 0.0, "speculating": 0.0}
    answers: dict[str, list[list[int]]] = {"plain": [], "speculating": []}
    for text, (prompt, options) in zip(texts, asked):
        for way, each in (("plain", plain), ("speculating", speaker)):
            started = time.perf_counter()
            answers[way].append(each.generate(each.guided, [prompt], **options)[0])
            seconds[way] += time.perf_counter() - started
        if args.prompt:
            print(f"\n{text}\n    {plain.tokenizer.decode(answers['speculating'][-1]).strip()}")
    prompts = [prompt for prompt, _ in asked]
    draft = (args.draft or plugged.own_path.name).rstrip("/").rpartition("/")[2]
    report(plugged.guided.name, draft, speaker.guided, prompts, answers, seconds, passes, args)


def report(
    name: str,
    draft: str,
    system: Speculative,
    prompts: list[list[int]],
    answers: dict[str, list[list[int]]],
    seconds: dict[str, float],
    passes: Passes,
    args,
) -> None:
    """How speculation went beside plain decoding of the same prompts."""
    plain_tokens, tokens = [sum(map(len, answers[way])) for way in ("plain", "speculating")]
    print(
        f"\n{name}, {system.ahead} tokens at a time drafted by {draft} with the same z_delta: {len(prompts)} answers, "
        f"{tokens} tokens"
    )
    if args.temperature == 0:
        gaps = [
            gap_at_difference(system.guided, prompt, one, other)
            for prompt, one, other in zip(prompts, answers["plain"], answers["speculating"])
            if one != other
        ]
        if gaps:
            print(
                f"    {len(gaps)} answers differ from those without, first where the two best logits are at most "
                f"{max(gaps):.1e} apart"
            )
        else:
            print("    the same tokens as without")
    shares = [
        f"{share:.2f}" if tried else "-" for share, tried in zip(system.acceptance, system.tried)
    ]
    print(
        f"    drafted tokens accepted, by position: {' '.join(shares)}; {tokens / system.rounds:.2f} tokens a round"
    )
    print(
        f"    milliseconds: {1000 * passes.plain:.2f} for a guided token, {1000 * passes.drafted:.2f} to draft one, "
        f"{1000 * passes.verified:.2f} to verify {system.ahead}"
    )
    predicted = predicted_speed_up(
        [len(answer) for answer in answers["speculating"]], system.acceptance, passes
    )
    measured = seconds["plain"] / plain_tokens / (seconds["speculating"] / tokens)
    verdict = "" if measured > 1 else ": it does not pay here"
    print(f"    speed-up: predicted {predicted:.2f}, measured {measured:.2f}{verdict}")


@torch.inference_mode()
def gap_at_difference(guided: Guided, prompt: list[int], one: list[int], other: list[int]) -> float:
    """How far the two best logits are apart where two greedy answers part: rounding alone can decide a near-tie."""
    same = 0
    while one[same : same + 1] == other[same : same + 1]:
        same += 1
    z = guided.logits(torch.tensor([prompt + one[:same]], device=guided.base.device))[0, -1]
    first, second = z.float().topk(2).values
    return (first - second).item()
