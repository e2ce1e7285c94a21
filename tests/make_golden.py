"""Write tests/golden with transformers, an independent program: small checkpoints, their logits, and token ids.

    python -m tests.make_golden                         # checkpoints and logits, with transformers 5
    python -m tests.make_golden --vendors               # token ids in the templates of VENDORS, with transformers 5
    python -m tests.make_golden --tokenizers FOLDER     # token ids, with transformers 4 and protobuf, from
                                                        # llama2-tokenizer.model and llama3-tokenizer.model in FOLDER
    python -m tests.make_golden --tokenizers FOLDER --templates TEMPLATES    # hashes of the token ids of 500 conversations, with the
                                                        # vendors' chat_template in TEMPLATES: llama-2.jinja, llama-3.jinja, zephyr.jinja

The results are in the repository, so the tests themselves need no transformers. Run it again only to add a case.
"""

import argparse
import functools
import hashlib
import json
import random
import tempfile
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden"

COMMON = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=96,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
)
LLAMA3 = dict(
    rope_type="llama3",
    factor=32.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
    rope_theta=500000.0,
)
SMALLER = COMMON | dict(hidden_size=16, intermediate_size=24, num_key_value_heads=2)
STYLES = {  # model_type is llama where none is named
    "llama-2": COMMON,
    "tinyllama": COMMON | dict(num_key_value_heads=2),
    "codellama": COMMON
    | dict(vocab_size=112, rope_parameters=dict(rope_type="default", rope_theta=1e6)),
    "llama-3.2": COMMON
    | dict(num_key_value_heads=2, tie_word_embeddings=True, rope_parameters=LLAMA3),
    "own-head-dim": COMMON | dict(num_key_value_heads=1, head_dim=12),
    "linear": COMMON
    | dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=10000.0)),
    "llama-bias": SMALLER | dict(attention_bias=True),
    "mistral": SMALLER | dict(model_type="mistral", sliding_window=150),
    "qwen2": SMALLER | dict(model_type="qwen2", tie_word_embeddings=True),
    "qwen3": SMALLER | dict(model_type="qwen3", head_dim=12),
}

# Scripts, emoji, runs of spaces, code, numbers, and other things that tokenizers disagree about.
HARD_STRINGS = [
    "",
    " ",
    "  ",
    "a",
    " a",
    "a ",
    "  two  spaces  ",
    "\n",
    "\n\n\n",
    "\t",
    "tab\tand\nnewline\r\n",
    "x" * 50,
    "Hello, world!",
    "I'll, you've, DON'T, it's",
    "naïve café — “quoted” …",
    "Straße ÄÖÜ ß",
    "Ελληνικά και άλλα",
    "Русский текст, пожалуйста",
    "עברית מימין לשמאל",
    "العربية أيضا",
    "हिन्दी में वाक्य",
    "ไทยไม่มีช่องว่าง",
    "汉字和标点。",
    "日本語テキスト、カタカナ",
    "한국어 문장",
    "👍",
    "👩‍👩‍👧‍👦 family 🇩🇪",
    "e\u0301 combining n\u0303",
    "\u200bzero\u200dwidth",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𓀀",
    "0123456789",
    "3.14159e-10 1,000,000 0xFF",
    "def f(x):\n    return x ** 2  # square\n",
    "for (int i=0;i<10;++i){a[i]+=1;}",
    '<html><body class="x">&amp;</body></html>',
    "[INST] <<SYS>> [/INST]",
    "https://example.org/a?b=c&d=%20#e",
    "\u00a0non\u00a0breaking",
    "\ufeffmark",
    "null\x00byte \x07bell \x1b[0m",
    "\ufffd replacement",
    "MiXeD CaSe WoRdS ANDMORE",
]


def seeded(settings: dict):
    """transformers' model of these settings, with seeded weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**{"model_type": "llama"} | settings)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # far from the initialisation, so that no part can hide
        torch.nn.init.normal_(
            parameter, std=0.3
        ) if parameter.dim() == 2 else torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def tokens_for(vocab_size: int):
    import torch

    return torch.randint(vocab_size, (2, 150), generator=torch.Generator().manual_seed(1))


def write_checkpoints() -> None:
    import torch
    from safetensors.torch import save_file

    for name, settings in STYLES.items():
        folder = GOLDEN / name
        if folder.exists():  # remove a folder to have it made anew
            continue
        model = seeded(settings)
        model.save_pretrained(folder, max_shard_size="20KB" if name == "codellama" else "5GB")
        (folder / "generation_config.json").unlink(missing_ok=True)
        with torch.no_grad():
            logits = model(tokens_for(settings["vocab_size"])).logits
        save_file({"logits": logits[:, ::10].contiguous()}, folder / "golden_logits.safetensors")


def odd_conversations(count: int = 500) -> list[list[tuple[str, str]]]:
    """Seeded conversations of one to three exchanges, half of them with a system turn, with odd spaces around and in texts."""
    rng = random.Random("odd conversations")
    spaces = ["", "", " ", "  ", "\n", "\n\n", "\t", " \n "]

    def text() -> str:
        words = [
            rng.choice(HARD_STRINGS[11:])
            if rng.random() < 0.2
            else rng.choice(["Hello", "the", "sky", "is", "7", "blue."])
            for _ in range(rng.randint(1, 6))
        ]
        middle = "".join(word + rng.choice([" ", " ", "  ", "\n"]) for word in words).strip() or "x"
        return rng.choice(spaces) + middle + rng.choice(spaces)

    found = []
    for number in range(count):
        turns = [("system", text())] if number % 2 else []
        for _ in range(rng.randint(1, 3)):
            turns += [("user", text()), ("assistant", text())]
        found.append(turns)
    return found


# Chat templates that render as the vendors' do. Mistral's are of its tokenizers v1 (v0.1, v0.2 of the
# 7B: [INST] is text), v3 (v0.3: [INST] is a token) and v3-tekken (Nemo: byte-level, no spaces).
SYSTEM_FIRST = (
    "{% set ns = namespace(system='') %}{{ bos_token }}{% for turn in messages %}"
    "{% if turn.role == 'system' %}{% set ns.system = turn.content + '\n\n' %}"
    "{% elif turn.role == 'user' %}QUESTION{% set ns.system = '' %}"
    "{% else %}ANSWER{% endif %}{% endfor %}"
)
MISTRAL_V1 = SYSTEM_FIRST.replace(
    "QUESTION", "{{ '[INST] ' + ns.system + turn.content + ' [/INST]' }}"
).replace("ANSWER", "{{ ' ' + turn.content | trim + eos_token }}")
MISTRAL_V3 = MISTRAL_V1.replace("' [/INST]'", "'[/INST]'")
MISTRAL_TEKKEN = MISTRAL_V3.replace("'[INST] '", "'[INST]'").replace("' ' + turn", "turn")
QWEN25 = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\n"
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{% for turn in messages %}{{ '<|im_start|>' + turn.role + '\n' + turn.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VENDORS = {  # a vendor's template, and the golden tokenizer that it is rendered with
    "mistral-v1": (MISTRAL_V1, "json-pieces"),
    "mistral-v3": (MISTRAL_V3, "json-pieces"),
    "mistral-tekken": (MISTRAL_TEKKEN, "json-bytes"),
    "qwen2.5": (QWEN25, "json-bytes"),
}


def write_vendors_tokenizer(name: str, folder: Path) -> None:
    """The small golden tokenizer of a vendor's template as a folder, with what it needs in it."""
    template, golden = VENDORS[name]
    raw = json.loads((GOLDEN / golden / "tokenizer.json").read_text())
    config = json.loads((GOLDEN / golden / "tokenizer_config.json").read_text())
    if name in ("mistral-v3", "mistral-tekken"):
        size = len(raw["model"]["vocab"]) + 10
        more = [raw["added_tokens"][0] | {"content": mark} for mark in ("[INST]", "[/INST]")]
        raw["added_tokens"] += [token | {"id": size + n} for n, token in enumerate(more)]
    if name == "mistral-v3":  # as transformers writes what was no legacy tokenizer
        raw["normalizer"] = None
        raw["pre_tokenizer"] = {
            "type": "Metaspace",
            "replacement": "\u2581",
            "prepend_scheme": "first",
            "split": False,
        }
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))


@functools.cache
def vendors_tokenizer(folder: Path):
    """A folder's tokenizer as transformers has it, with the folder's own chat template."""
    from transformers import PreTrainedTokenizerFast

    config = json.loads((folder / "tokenizer_config.json").read_text())
    ends = {name: config.get(name) for name in ("bos_token", "eos_token")}
    for name, end in ends.items():
        ends[name] = end["content"] if isinstance(end, dict) else end
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **ends)
    tokenizer.chat_template = config["chat_template"]
    return tokenizer


def vendors_ids(folder: Path, turns: list[tuple[str, str]], **options) -> list[int]:
    """A conversation as transformers renders and encodes it with a folder's own template."""
    messages = [{"role": role, "content": text} for role, text in turns]
    return vendors_tokenizer(folder).apply_chat_template(messages, return_dict=False, **options)


def harmless_conversations() -> list[list[tuple[str, str]]]:
    """200 of odd_conversations in which nobody writes [INST], which transformers takes for the token."""
    return [turns for turns in odd_conversations() if "[INST]" not in str(turns)][:200]


def write_vendors() -> None:
    hashes = {}
    for name in VENDORS:
        with tempfile.TemporaryDirectory() as folder:
            write_vendors_tokenizer(name, Path(folder))
            hashes[name] = [
                hash_ids(vendors_ids(Path(folder), turns)) for turns in harmless_conversations()
            ]
    (GOLDEN / "chats_of_vendors.json").write_text(json.dumps(hashes) + "\n")


def hash_ids(ids: list[int]) -> str:
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()[:8]


def write_tokenizer_json() -> None:
    """A small tokenizer.json of each form, trained by the library tokenizers on HARD_STRINGS, and transformers' ids of the texts."""
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    by_bytes = Tokenizer(models.BPE())
    by_bytes.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    by_bytes.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    by_bytes.train_from_iterator(HARD_STRINGS * 3, trainer)
    by_bytes.add_tokens(
        [AddedToken("Straße", normalized=False), AddedToken("    ", normalized=False)]
    )

    by_pieces = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    by_pieces.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    by_pieces.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    words = [
        ("\u2581" + text.replace(" ", " \u2581")).split() for text in HARD_STRINGS if text.isascii()
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    by_pieces.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    by_pieces.normalizer, kept = None, by_pieces.normalizer
    by_pieces.train_from_iterator([" ".join(each) for each in words] * 3, trainer)
    raw = json.loads(by_pieces.to_str())
    raw["pre_tokenizer"] = None
    raw["added_tokens"] = [
        token for token in raw["added_tokens"] if not token["content"].startswith("<0x")
    ]  # plain pieces of the vocabulary
    by_pieces = Tokenizer.from_str(json.dumps(raw))
    by_pieces.normalizer = kept
    for name, made, bos, eos in (
        ("json-bytes", by_bytes, "<|im_start|>", "<|im_end|>"),
        ("json-pieces", by_pieces, "<s>", "</s>"),
    ):
        folder = GOLDEN / name
        folder.mkdir(exist_ok=True)
        made.save(str(folder / "tokenizer.json"), pretty=False)
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"bos_token": bos, "eos_token": {"content": eos}}) + "\n"
        )
        theirs = PreTrainedTokenizerFast(
            tokenizer_object=made, bos_token=bos, eos_token=eos, split_special_tokens=True
        )
        texts = [*HARD_STRINGS, "a <|im_end|> b", "</s><s>", "<unk> <0x0A>", "1234 56"]
        cases = [
            {"text": text, "ids": theirs.encode(text, add_special_tokens=False)}
            for text in texts
            if "Straße" not in text
        ]
        (folder / "token_ids.json").write_text(json.dumps(cases) + "\n")


def write_token_ids(folder: Path, templates: Path | None) -> None:
    # transformers 5 derives other merges from Llama-2's tokenizer.model than SentencePiece has (runs of spaces), so
    # these come from transformers 4, whose fast tokenizers are a second implementation of the same file.
    from transformers import LlamaTokenizerFast, PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    from data.tokenizer import (
        TiktokenTokenizer,
    )  # for the split pattern alone, which is part of Llama-3's definition

    llama2 = LlamaTokenizerFast(
        vocab_file=str(folder / "llama2-tokenizer.model"), legacy=True, add_prefix_space=True
    )
    llama3 = PreTrainedTokenizerFast(
        tokenizer_object=TikTokenConverter(
            str(folder / "llama3-tokenizer.model"),
            TiktokenTokenizer.pattern,
            additional_special_tokens=[],
        ).converted()
    )
    if templates:
        hashes = {}
        llama3.add_special_tokens(
            {
                "additional_special_tokens": [
                    "<|begin_of_text|>",
                    "<|start_header_id|>",
                    "<|end_header_id|>",
                    "<|eot_id|>",
                ]
            }
        )
        llama3.bos_token = "<|begin_of_text|>"
        ours = TiktokenTokenizer((folder / "llama3-tokenizer.model").read_bytes()).specials
        for name, tokenizer in {"llama-2": llama2, "llama-3": llama3, "zephyr": llama2}.items():
            tokenizer.chat_template = (templates / f"{name}.jinja").read_text(encoding="utf-8")
            ids = (
                {tokenizer.convert_tokens_to_ids(special): ours[special] for special in ours}
                if name == "llama-3"
                else {}
            )
            hashes[name] = [
                hash_ids(
                    [
                        ids.get(id, id)
                        for id in tokenizer.apply_chat_template(
                            [{"role": role, "content": text} for role, text in turns]
                        )
                    ]
                )
                for turns in odd_conversations()
            ]
        (GOLDEN / "chats.json").write_text(json.dumps(hashes) + "\n")
        return
    for name, tokenizer in {"llama-2": llama2, "llama-3": llama3}.items():
        cases = [
            {"text": text, "ids": tokenizer.encode(text, add_special_tokens=False)}
            for text in HARD_STRINGS
        ]
        (GOLDEN / f"token_ids_{name}.json").write_text(
            json.dumps(cases, ensure_ascii=True, indent=0) + "\n"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--tokenizers", type=Path, help="write the token ids, with the tokenizers in this folder"
    )
    parser.add_argument(
        "--templates",
        type=Path,
        help="write the hashes of conversations, with the chat templates in this folder",
    )
    parser.add_argument(
        "--json", action="store_true", help="write the small files of tokenizer.json"
    )
    parser.add_argument(
        "--vendors",
        action="store_true",
        help="write the hashes of conversations in the templates of VENDORS",
    )
    args = parser.parse_args()
    if args.json:
        write_tokenizer_json()
        raise SystemExit
    if args.vendors:
        write_vendors()
        raise SystemExit
    write_token_ids(args.tokenizers, args.templates) if args.tokenizers else write_checkpoints()
