"""Tiny random models of every family that transformers generates text with, made from its own configuration class, and
what PEFT answers on them: for the table of families and for the tests."""

from __future__ import annotations

import copy
import inspect
import itertools
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from prefix_store.errors import InvalidArtefactError
from prefix_store.peft_format import read_peft
from prefix_store.prefix import ModelShape, Prefix
from server.engine.checked_model import FAMILIES, CheckedModel, checked_model
from server.engine.cpu_kernels import CpuKernels
from server.engine.errors import ModelRefusedError, one_line
from server.engine.model_runner import model_class
from tests.cases import Case, World, generated

VOCAB, HIDDEN, NUM_LAYERS, POSITIONS, WINDOW = 120, 64, 4, 256, 12
NUM_TOKENS = 24
MAX_WEIGHTS = 120_000_000
PROMPT_LENGTHS = (3, 9, 17, 30)
NAMES = {"kv": "KV prefix", "soft": "soft prompt"}
NUM_VIRTUAL_TOKENS = {"kv": 7, "soft": 5}
GAINS = ((1.5, 0.5), (3.0, 0.05), (6.0, 0.02), (1.0, 1.0))  # of random weights and of embeddings, until answers vary
SEEDS = (0, 1)
WAYS: dict[str, dict[str, Any]] = {
    "mixed": {"stagger": 20, "max_step_tokens": 512},
    "staggered": {"stagger": 1},
    "alone": {"stagger": 1, "max_rows": 1},
}
# Measures by the names that configurations have for them.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size", "dim"), HIDDEN),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), NUM_LAYERS),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "rotary_dim", "dim_head", "swa_head_dim"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff", "dim_ff"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "intermediate_size_mlp", "dff"), 64),
    **dict.fromkeys(("expert_ffn_hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("vocab_size", "decoder_vocab_size", "src_vocab_size", "tgt_vocab_size", "n_vocab"), VOCAB),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len"), POSITIONS
    ),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "window_size", "sliding_window_size"), WINDOW),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "top_k", "moe_topk", "moe_k", "top_k_experts", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "moe_layer_freq"), 1),
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "use_sliding_window": True,
    "max_window_layers": 2,
    "floor_scale": 8,
    "global_head_dim": 32,
    "index_topk": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCAB,
    "num_kv_shared_layers": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    "forced_bos_token_id": None,
    "mamba_expand": 1,
    "state_size": 8,
    "scale_embedding": True,
}
# What a family wants beside or instead.
ENCODERS = (
    *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
    *("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod"),
)
LATENT = (  # attention out of one compressed vector a token: as many heads of keys as of queries
    *("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "longcat_flash"),
    *("minicpm3", "youtu", "kimi_linear", "bailing_hybrid"),
)
HYBRID = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
GEMMA_LAYERS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
SHARING = {"num_hidden_layers": 6, "num_kv_shared_layers": 2, "layer_types": [*GEMMA_LAYERS, *GEMMA_LAYERS[:2]]}
DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
MORE: dict[str, dict[str, Any]] = {
    **{name: {"is_decoder": True} for name in ENCODERS},
    **{name: {"num_key_value_heads": 4, "v_head_dim": 24} for name in LATENT},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
    "bamba": HYBRID,
    "falcon_h1": HYBRID | {"mamba_d_ssm": 64},
    "dbrx": {"max_seq_len": POSITIONS},
    "zamba2": {"num_hidden_layers": 54},
    "xlm": {"emb_dim": HIDDEN, "n_words": VOCAB},
    "deepseek_v4": {"o_lora_rank": 16, "o_groups": 1},
    "dots3_note": {"num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma4": SHARING,
    "gemma4_text": SHARING,
    "gemma4_unified": SHARING | {"hidden_size_per_layer_input": 0},
    "gemma4_unified_text": SHARING | {"hidden_size_per_layer_input": 0},
    "gemma3n_text": SHARING | {"activation_sparsity_pattern": [0.0] * 6, "laurel_rank": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": HYBRID,
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 1},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 48], "axial_pos_shape": [16, 16]},
    "zaya": {"num_experts_per_tok": 1},
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "olmo_hybrid"), DELTA),
}


@dataclass(frozen=True)
class Family:
    """`model_type` as transformers has it."""

    model_type: str
    is_seq2seq: bool

    @property
    def label(self) -> str:
        return f"{self.model_type} (encoder-decoder)" if self.is_seq2seq else self.model_type


def families() -> list[Family]:
    """All that transformers generates text with from text."""
    causal = [Family(name, False) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    return sorted(
        [*causal, *(Family(name, True) for name in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)],
        key=lambda family: (family.is_seq2seq, family.model_type),
    )


def tiny_config(model_type: str) -> Any:
    """The family's configuration with everything in it small."""
    kind = CONFIG_MAPPING[model_type]
    config = kind(**_sizes(kind, MORE.get(model_type, {})))
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 2
    return config


def _sizes(kind: Any, more: dict[str, Any]) -> dict[str, Any]:
    names = _fields(kind)
    sizes = {name: size for name, size in SIZES.items() if name in names}
    for name, sub in (getattr(kind, "sub_configs", None) or {}).items():
        if name == "text_config" and hasattr(sub, "model_type") and sub.model_type:
            sizes[name] = _sizes(sub, more)
            more = {}
    return sizes | more


def _fields(kind: Any) -> set[str]:
    found = set(inspect.signature(kind.__init__).parameters) | set(getattr(kind, "__annotations__", {}))
    for parent in kind.__mro__:
        found |= set(getattr(parent, "__annotations__", {}))
    return found


def random_model(family: Family, config: Any, gain: tuple[float, float], seed: int) -> Any:
    """Weights drawn so that no token follows from the one before it alone."""
    torch.manual_seed(seed)
    kind: Any = AutoModelForSeq2SeqLM if family.is_seq2seq else AutoModelForCausalLM
    model = kind.from_config(config).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2 and "embed" not in name and "wte" not in name and "shared" not in name:
                weight.normal_(0, gain[0] / weight.shape[-1] ** 0.5)
            elif weight.dim() >= 2:
                weight.normal_(0, gain[1])
            elif "norm" in name and "weight" in name:
                weight.add_(torch.randn_like(weight) * 0.1)
            else:
                weight.normal_(0, 0.1)
    return model


@dataclass(frozen=True)
class References:
    """What PEFT answers, alone, and what of it proves something."""

    prefixes: dict[str, Prefix]
    cases: list[Case]
    note: str

    @property
    def num_distinct(self) -> int:
        return len({token for case in self.cases for token in case.tokens})

    @property
    def is_telling(self) -> bool:
        """Tokens vary, and every prefix changes answers: behind a window's length of text it may no longer."""
        answers: dict[str, list[list[int]]] = {}
        for case in self.cases:
            answers.setdefault(case.name.split()[0], []).append(case.tokens)
        return self.num_distinct >= 8 and all(
            one != other for one, other in itertools.combinations(answers.values(), 2)
        )


def references(model: Any, family: Family, folder: Path, shape: ModelShape) -> References:
    """Of bare rows and of every prefix that PEFT makes for the family, for prompts of several lengths."""
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(3, VOCAB - 8, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]
    prefixes: dict[str, Prefix] = {}
    cases = [_case(model, "bare", prompt, None, family) for prompt in prompts]
    task = TaskType.SEQ_2_SEQ_LM if family.is_seq2seq else TaskType.CAUSAL_LM
    notes = []
    for name, kind in (("kv", PrefixTuningConfig), ("soft", PromptTuningConfig)):
        try:
            adapter = kind(task_type=task, num_virtual_tokens=NUM_VIRTUAL_TOKENS[name])
            peft = get_peft_model(copy.deepcopy(model), adapter)
            for parameter in peft.parameters():
                if parameter.requires_grad:
                    parameter.data = torch.randn(parameter.shape, generator=generator)
            peft.eval().save_pretrained(folder / name)
            found = [_case(peft, name, prompt, name, family) for prompt in prompts]
        except Exception as error:  # PEFT's own
            print(f"{family.label}: PEFT makes no {name}: {one_line(error)}")
            notes.append(f"PEFT makes no {NAMES[name]} for it")
            continue
        files = ("adapter_config.json", "adapter_model.safetensors")
        try:
            prefixes[name] = read_peft(*((folder / name / file).read_bytes() for file in files), shape)
        except InvalidArtefactError as error:
            notes.append(f"{NAMES[name]} refused: {error}")
            continue
        cases += found
    cases.sort(key=lambda case: len(case.prompt))  # kinds by turns
    return References(prefixes, cases, "; ".join(notes))


def _case(model: Any, kind: str, prompt: list[int], prefix: str | None, family: Family) -> Case:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokens, logits = generated(model, prompt, NUM_TOKENS)
    members = ((prefix,),) if prefix else ((),)
    return Case(f"{kind} {len(prompt)}", prompt, members, tokens, logits)


@dataclass(frozen=True)
class Verdict:
    """`kind` is served, refused, wrong, failed (a traceback) or untried; `detail` what was answered wrongly, or why."""

    family: Family
    kind: str
    detail: str = ""
    tried: tuple[str, ...] = ()


class UntriedError(Exception):
    """No tiny model of the family can be made here."""


def start(folder: Path, kernels: CpuKernels | None) -> CheckedModel:
    """As the server starts a model, in fp32."""
    return checked_model(folder, torch.float32, torch.device("cpu"), name="tiny", fingerprint="none", kernels=kernels)


def make_world(family: Family, folder: Path, kernels: CpuKernels | None) -> tuple[World, References]:
    """A tiny model of the family, saved in `folder` and started, and PEFT's answers, of the first weights that tell
    prefixes apart. Raises ModelRefusedError, UntriedError."""
    kind: Any = AutoModelForSeq2SeqLM if family.is_seq2seq else AutoModelForCausalLM
    try:
        config = tiny_config(family.model_type)
        config.save_pretrained(folder)
        model_class(AutoConfig.from_pretrained(folder))
        with torch.device("meta"):
            num_weights = sum(weight.numel() for weight in kind.from_config(config).parameters())
    except ModelRefusedError as error:
        raise ModelRefusedError(f"{family.model_type} cannot be served: {error}") from error
    except Exception as error:  # a configuration wants what SIZES and MORE do not give, or a package
        raise UntriedError(f"no tiny model: {one_line(error)}") from error
    if num_weights > MAX_WEIGHTS:
        raise UntriedError(f"its smallest configuration here has {num_weights:,} weights")
    found = None
    for gain, seed in itertools.product(GAINS, SEEDS):
        random_model(family, config, gain, seed).save_pretrained(folder)
        checked = start(folder, kernels)
        asked = references(kind.from_pretrained(folder).eval(), family, folder, checked.shape)
        if found is None or asked.num_distinct > found[1].num_distinct:
            found = World(checked.model, checked.shape, asked.prefixes, asked.cases, checked.kernels), asked
        if asked.is_telling:
            break
    assert found is not None
    return found


def judge(family: Family, folder: Path, kernels: CpuKernels | None) -> Verdict:
    """Every request against PEFT's answer to it alone."""
    try:
        world, asked = make_world(family, folder, kernels)
    except UntriedError as error:
        return Verdict(family, "untried", str(error))
    except ModelRefusedError as error:
        return Verdict(family, "refused", str(error).removesuffix(f"; {FAMILIES}"))
    errors = [f"{way}: {error}" for way, options in WAYS.items() for error in world.answers(**options)]
    tried = tuple(sorted({case.name.split()[0] for case in asked.cases}))
    note = "" if asked.is_telling else f"its random answers vary little ({asked.num_distinct} distinct tokens); "
    if errors:
        return Verdict(family, "wrong", note + "; ".join(errors[:4]) + f" ({len(errors)} in all)", tried)
    return Verdict(family, "served", (note + asked.note).removesuffix("; "), tried)
