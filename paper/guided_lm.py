"""A guided base as lm-evaluation-harness asks for a model: log-likelihoods of continuations and of
texts, and answers.

    from paper.guided_lm import GuidedLM
    lm_eval.simple_evaluate(GuidedLM(Guided(base, value), tokenizer), tasks=["arc_challenge"], num_fewshot=25)

paper/evaluate.py is the command. Tests hold every number and string against the harness's own `hf`
backend.
"""

from collections.abc import Iterator
from itertools import groupby

import torch
import torch.distributed as dist

from data.chat import encode_chat, end_token, stop_ids, with_system
from data.errors import UsageError
from data.records import Turn
from data.tokenizer import StreamDecoder, Tokenizer
from sample import Guided, generate, score

try:  # paper.evaluate says it in one line where the harness is not installed
    from lm_eval.api.model import TemplateLM
except ImportError:
    TemplateLM = object

ALIKE = 0.8  # the shortest prompt of a batch over the longest, at least: padding is computed, too


class ChatText(str):
    """A chat as the harness shows it; `turns` are encoded, so text is never a special token."""

    turns: list[Turn]


class GuidedLM(TemplateLM):
    """A guided base for lm-evaluation-harness, whose TemplateLM splits texts.

    Under torchrun every process computes the same, so each says that it is the only one.
    """

    batch_sizes: dict = {}  # which the harness would record

    def __init__(
        self, guided: Guided, tokenizer: Tokenizer, template: str = "llama-2", system: str = ""
    ):
        super().__init__()
        self.guided, self.tokenizer, self.template, self.system = (
            guided,
            tokenizer,
            template,
            system,
        )
        self.llamas = list(dict.fromkeys([guided.base, *guided.llamas]))
        self.max_length = min(llama.config.max_position_embeddings for llama in self.llamas)
        self.room = room_for_batches(guided.base.device)
        # A tokenizer.json says itself whether a text begins with BOS; the other two kinds always
        # do.
        self.adds_bos = tokenizer.kind != "json" or tokenizer.backend.encode("a").ids[:1] == [
            tokenizer.bos_id
        ]

    # ---- text and tokens

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands in front of a text that has no context."""
        return self.tokenizer.eos_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return f"{self.template}-{self.tokenizer.fingerprint(self.tokenizer.vocab_size)[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str:
        """What the result files record."""
        return self.template if chat_template else ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> ChatText:
        turns = with_system(
            self.system, [(message["role"], message["content"]) for message in chat_history]
        )
        text = ChatText(self.spell(self.chat_ids(turns)))
        text.turns = turns
        return text

    def chat_ids(self, turns: list[Turn]) -> list[int]:
        """A chat's tokens, by encode_chat; an assistant's turn at its end is left open."""
        ids, _ = encode_chat(self.tokenizer, self.template, turns)
        if turns[-1][0] != "assistant":
            return ids
        while ids.pop() != end_token(self.tokenizer, self.template):  # and what stands behind it
            pass
        return (
            ids[:-1] if self.template == "llama-2" else ids
        )  # a space, which ends an answer there

    def spell(self, ids: list[int]) -> str:
        """Tokens as text, with special ones by name."""
        names = {id: name for name, id in self.tokenizer.specials.items()}
        if not names:  # SentencePiece
            names = {self.tokenizer.bos_id: "<s>", self.tokenizer.eos_id: "</s>"}
        return b"".join(
            self.tokenizer.token_bytes(id) or names.get(id, "").encode() for id in ids
        ).decode(errors="replace")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        if isinstance(string, ChatText):
            return self.chat_ids(string.turns)
        return self.tokenizer.encode(
            string, bos=self.adds_bos if add_special_tokens is None else add_special_tokens
        )

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if not isinstance(context, ChatText):
            return super()._encode_pair(context, continuation)
        begun = context.turns[-1][1] if context.turns[-1][0] == "assistant" else None
        turns = [
            *(context.turns if begun is None else context.turns[:-1]),
            ("assistant", (begun or "") + continuation),
        ]
        ids = self.chat_ids(context.turns)
        return ids, self.chat_ids(turns)[len(ids) :]

    # ---- how much at a time

    def fits(self, rows: int, longest: int, predicted: int) -> bool:
        """Whether `rows` rows of `longest` positions fit, with logits of the last `predicted`.

        A cascade asks for the logits of all.
        """
        configs = [llama.config for llama in self.llamas]
        cached = sum(
            2 * each.num_hidden_layers * each.num_key_value_heads * each.head_dim
            for each in configs
        )
        cached *= self.guided.base.dtype.itemsize
        logits = 16 * max(
            each.vocab_size for each in configs
        )  # z_base, z_delta, z_post, and log p in float32
        if self.guided.value is not None and self.guided.value.scheme.startswith("cascade"):
            predicted = longest
        return (
            rows * (2 * longest * cached + predicted * logits) <= self.room
        )  # twice: rows of one context are forked

    def bar(self, total: int, what: str, hidden: bool):
        from tqdm import tqdm  # the harness brings it

        return tqdm(total=total, desc=what, disable=hidden)

    # ---- how likely given continuations are

    def _loglikelihood_tokens(
        self, requests: list[tuple], disable_tqdm: bool = False, **_
    ) -> list[tuple[float, bool]]:
        """Each continuation's log-likelihood in nats, and whether it is the greedy answer."""
        pairs = [self.cut(context, continuation) for _, context, continuation in requests]
        results: list = [None] * len(pairs)
        with self.bar(len(pairs), "log-likelihoods", disable_tqdm) as bar:
            for batch in self.batches(pairs):
                for number, result in zip(
                    batch, score(self.guided, [pairs[number] for number in batch], len(batch))
                ):
                    results[number] = result
                    if requests[number][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[number][0], result)
                bar.update(len(batch))
        return results

    def cut(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """Where both are too long, the context loses its beginning. The last token is not read."""
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise UsageError(
                f"a continuation is {len(continuation)} tokens long, and the checkpoint ends at {self.max_length}"
            )
        return context[-room:], continuation

    def batches(self, pairs: list[tuple[list[int], list[int]]]) -> Iterator[list[int]]:
        """Numbers of pairs, long contexts first; a context's pairs together, if they fit."""
        order = sorted(
            range(len(pairs)),
            key=lambda number: (-len(pairs[number][0]), pairs[number][0], -len(pairs[number][1])),
        )
        batch, longest, predicted = [], 0, 0
        for context, group in groupby(order, key=lambda number: pairs[number][0]):
            group = list(group)
            most = len(pairs[group[0]][1])
            fits = self.fits(
                len(batch) + len(group), longest + max(predicted, most), max(predicted, most)
            )
            if batch and not (fits and len(context) >= ALIKE * longest):
                yield batch
                batch, longest, predicted = [], 0, 0
            longest, predicted = max(longest, len(context)), max(predicted, most)
            for number in group:
                if batch and not self.fits(len(batch) + 1, longest + predicted, predicted):
                    yield batch
                    batch, predicted = [], len(pairs[number][1])
                batch.append(number)
        if batch:
            yield batch

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in the harness's windows: each token once, with what fits before it.

        Its rule puts prefix_token_id in front of what tok_encode says, so a tokenizer's own BOS is
        scored, too.
        """
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        totals = []
        for first in range(
            0, len(requests), 64
        ):  # so that a run that is stopped has some in the cache
            texts = [request.args[0] for request in requests[first : first + 64]]
            windows = []
            for text in texts:
                cut = get_rolling_token_windows(
                    self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
                )
                windows.append([(None, *make_disjoint_window(window)) for window in cut])
            scores = iter(
                self._loglikelihood_tokens(
                    [window for each in windows for window in each], disable_tqdm
                )
            )
            for text, each in zip(texts, windows):
                totals.append(sum(next(scores)[0] for _ in each))
                self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    # ---- answers

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Answers; requests with the same settings are answered together, long contexts first."""
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(repr(request.args[1]), []).append(number)
        answers: list = [None] * len(requests)
        with self.bar(len(requests), "answers", disable_tqdm) as bar:
            for numbers in alike.values():
                until, options = self.options(requests[numbers[0]].args[1])
                longest = self.max_length - options["max_new_tokens"]
                prompts = {
                    number: self.tok_encode(requests[number].args[0])[-longest:]
                    for number in numbers
                }
                numbers.sort(key=lambda number: -len(prompts[number]))
                while numbers:
                    count, positions = 1, len(prompts[numbers[0]]) + options["max_new_tokens"]
                    while (
                        count < len(numbers)
                        and len(prompts[numbers[count]]) >= ALIKE * len(prompts[numbers[0]])
                        and self.fits(count + 1, positions, 1)
                    ):
                        count += 1
                    batch, numbers = numbers[:count], numbers[count:]
                    options["seed"] = len(numbers)  # another one in each batch
                    for number, text in zip(
                        batch, self.answer([prompts[number] for number in batch], until, options)
                    ):
                        answers[number] = text
                        self.cache_hook.add_partial("generate_until", requests[number].args, text)
                    bar.update(count)
        return answers

    def options(self, settings: dict) -> tuple[list[str], dict]:
        """Stop strings and options of `generate`, from settings or the harness's defaults."""
        from lm_eval.models.utils import normalize_gen_kwargs

        settings = normalize_gen_kwargs(settings, 256)
        until, count = settings["until"], settings["max_gen_toks"]
        options = dict(
            max_new_tokens=count,
            temperature=settings.get("temperature", 0.0),
            top_p=settings.get("top_p", 1.0),
        )
        if not settings["do_sample"]:
            options["temperature"] = 0.0
        known = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}
        if unknown := settings.keys() - known:
            raise UsageError(
                f"a task asks for {', '.join(sorted(unknown))} in generation; here are {', '.join(sorted(known))}"
            )
        if count >= self.max_length:
            raise UsageError(
                f"a task asks for {count} tokens an answer (max_gen_toks), and the checkpoint ends at {self.max_length}"
            )
        named = {self.tokenizer.specials[stop] for stop in until if stop in self.tokenizer.specials}
        options["stop_ids"] = stop_ids(self.tokenizer, self.template, self.llamas) | named
        return [stop for stop in until if stop], options

    def answer(self, prompts: list[list[int]], until: list[str], options: dict) -> list[str]:
        """Answers up to the first stop string, which may begin and end within tokens."""
        decoders, said = [StreamDecoder(self.tokenizer) for _ in prompts], [""] * len(prompts)

        def has_stop(row: int, token: int) -> bool:
            new = decoders[row].push(token)
            said[row] += new
            return any(stop in said[row][-len(stop) - len(new) :] for stop in until)

        texts = [
            self.tokenizer.decode(ids)
            for ids in generate(self.guided, prompts, on_token=has_stop, **options)
        ]
        for stop in until:
            texts = [text.partition(stop)[0] for text in texts]
        return texts


def room_for_batches(device: torch.device) -> float:
    """Bytes for caches and logits: half of a GPU's free memory, 1 GB on a CPU.

    The first process decides for all.
    """
    room = [torch.cuda.mem_get_info()[0] / 2 if device.type == "cuda" else 1e9]
    if dist.is_initialized():
        dist.broadcast_object_list(room)
    return room[0]
