"""Those who answer a workload in a process of their own: PEFT in two ways, transformers' batching, OpenVINO GenAI."""

from __future__ import annotations

import time
import warnings
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from workloads import Ask, Task, Workload, measures_of

# Requests beyond which a rate does not depend on how many there are: one after another, and in a full batch.
MAX_SEQUENTIAL, MAX_BATCHED = 4, 128
MAX_STEP_TOKENS = 512
WITHOUT_PREFIXES = "without prefixes"


def _share(workload: Workload, num_asks: int) -> str:
    """What to say of those who answer only so many of the requests."""
    return f"{num_asks} of the requests" if num_asks < len(workload.asks) else ""


class Contender(Protocol):
    """`prepare` comes before the first `run` of a workload, and says in what it differs from what was asked."""

    def prepare(self, workload: Workload) -> str: ...

    def run(self, workload: Workload) -> float:
        """The figure, in the workload's unit."""
        ...


class Peft:
    """An adapter a task. One after another with `set_adapter` at each request, or grouped by task, a batch a task."""

    def __init__(self, model: Path, dtype: torch.dtype, *, is_grouped: bool) -> None:
        import peft
        from transformers import AutoModelForCausalLM, AutoTokenizer

        warnings.simplefilter("ignore")
        self._peft = peft
        self._base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._measures = measures_of(model)
        self._is_grouped = is_grouped
        self._model: Any = None

    def prepare(self, workload: Workload) -> str:
        batches = self._batches(workload)
        tasks = [batch[0].task for batch in batches if batch[0].task is not None]
        self._model = None  # the last workload's adapters go before this one's come
        for task in tasks:
            config = self._config(task)
            if self._model is None:
                self._model = self._peft.get_peft_model(self._base, config, adapter_name=task.name)
            elif task.name not in self._model.peft_config:
                self._model.add_adapter(task.name, config)
            self._model.prompt_encoder[task.name].embedding.weight.data = task.values(self._measures)
        self._model.eval()
        return _share(workload, sum(map(len, batches)))

    @torch.inference_mode()
    def run(self, workload: Workload) -> float:
        batches = self._batches(workload)
        start_s = time.perf_counter()
        for batch in batches:
            assert batch[0].task is not None
            self._model.set_adapter(batch[0].task.name)
            encoded = self._tokenizer([ask.text for ask in batch], return_tensors="pt")
            self._model.generate(
                input_ids=encoded["input_ids"],
                attention_mask=encoded["attention_mask"],
                max_new_tokens=workload.num_out,
                min_new_tokens=workload.num_out,
                do_sample=False,
            )
        return workload.figure(sum(map(len, batches)), time.perf_counter() - start_s)

    def _batches(self, workload: Workload) -> list[list[Ask]]:
        groups: defaultdict[Task | None, list[Ask]] = defaultdict(list)
        for ask in workload.asks:
            groups[ask.task].append(ask)
        if self._is_grouped and len(groups) < len(workload.asks):
            return list(groups.values())
        return [[ask] for ask in workload.asks[:MAX_SEQUENTIAL]]

    def _config(self, task: Task) -> Any:
        kind = self._peft.PromptTuningConfig if task.kind == "soft" else self._peft.PrefixTuningConfig
        return kind(task_type="CAUSAL_LM", num_virtual_tokens=task.num_virtual_tokens)


class Batcher(ABC):
    """Many requests at once, without prefixes; it keeps text for workloads that ask for the same one again."""

    def run(self, workload: Workload) -> float:
        if workload.lead is not None:
            self.generate([workload.lead], workload.num_out)
        asks = workload.asks[:MAX_BATCHED]
        start_s = time.perf_counter()
        self.generate(asks, workload.num_out)
        return workload.figure(len(asks), time.perf_counter() - start_s)

    @abstractmethod
    def generate(self, asks: Sequence[Ask], num_out: int) -> None:
        """`num_out` tokens for each, until the last has ended."""


class TransformersBatching(Batcher):
    """The continuous batching of transformers, its manager kept running."""

    def __init__(self, model: Path, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        warnings.simplefilter("ignore")
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._manager: Any = None

    def prepare(self, workload: Workload) -> str:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        if self._manager is not None:
            self._manager.stop(block=True)
            self._manager.destroy()
        self._manager = self._model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(
                num_blocks=4 * workload.num_at_once,
                max_batch_tokens=MAX_STEP_TOKENS,
                max_requests_per_batch=workload.num_at_once,
                allow_block_sharing=workload.lead is not None,
            ),
        )
        self._manager.start()
        return ", ".join(filter(None, (WITHOUT_PREFIXES, _share(workload, MAX_BATCHED))))

    def generate(self, asks: Sequence[Ask], num_out: int) -> None:
        ids = [self._tokenizer(ask.text)["input_ids"] for ask in asks]
        self._manager.add_requests(inputs=ids, max_new_tokens=num_out)
        lengths = []
        while len(lengths) < len(ids):
            answer = self._manager.get_result(timeout=1)
            if answer is None:
                assert self._manager.is_running(), "its thread has stopped"
            elif answer.is_finished():
                lengths.append(len(answer.generated_tokens))
        assert set(lengths) == {num_out}, f"expected {num_out} tokens each, got {set(lengths)}"


class OpenVino(Batcher):
    """OpenVINO GenAI's continuous batching, which reads the GGUF itself."""

    def __init__(self, folder: Path) -> None:
        import openvino_genai

        self._genai = openvino_genai
        found = list(folder.glob("*.gguf"))
        if len(found) != 1:
            raise FileNotFoundError(f"expected the default model's GGUF beside it, found {len(found)}")
        self._gguf = found[0]
        self._pipeline: Any = None
        self._keeps_text: bool | None = None

    def prepare(self, workload: Workload) -> str:
        keeps_text = workload.lead is not None
        if keeps_text != self._keeps_text:
            config = self._genai.SchedulerConfig()
            config.max_num_seqs = 64
            config.max_num_batched_tokens = MAX_STEP_TOKENS
            config.cache_size = 1  # GB
            config.enable_prefix_caching = keeps_text
            self._pipeline = self._genai.ContinuousBatchingPipeline(str(self._gguf), config, "CPU")
            self._keeps_text = keeps_text
        return ", ".join(filter(None, ("4-bit weights", WITHOUT_PREFIXES, _share(workload, MAX_BATCHED))))

    def generate(self, asks: Sequence[Ask], num_out: int) -> None:
        config = self._genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = num_out
        config.ignore_eos = True
        config.do_sample = False
        config.apply_chat_template = False
        answers = self._pipeline.generate([ask.text for ask in asks], [config] * len(asks))
        assert len(answers) == len(asks), f"expected {len(asks)} answers, got {len(answers)}"
