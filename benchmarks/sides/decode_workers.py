"""The two sides of `decode.py`, each in a process of its own that is told by a pipe what to do.

    python benchmarks/sides/decode_workers.py jaxllm|transformers

One JSON line in, [method, arguments]; the method's answer out, as one JSON line. A side loads its own library
only, so that the threads of one do not disturb the other.
"""

import json
import os
import sys
import time
from importlib.metadata import version
from typing import Any


class TransformersWorker:
    """Hugging Face transformers on torch."""

    def make(self, shape: dict[str, int], directory: str) -> None:
        """Writes a random model."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            **shape,
            max_position_embeddings=2048,
            initializer_range=0.05,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )
        LlamaForCausalLM(config).save_pretrained(directory)

    def load(self, directory: str, dtype: str, int8: bool = False) -> dict[str, Any]:
        """int8: weights of linears in 8 bits by torchao, whose 4 bits have no layout for a CPU (0.18)."""
        import torch
        from transformers import AutoModelForCausalLM

        self.model = None  # the old one goes before the new one comes
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
        self.model.eval()
        if int8:
            from torchao.quantization import Int8WeightOnlyConfig, quantize_

            quantize_(self.model, Int8WeightOnlyConfig())
        return {"threads": torch.get_num_threads()}

    def run(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        import torch
        from transformers import StoppingCriteriaList

        times = []

        def note(ids, scores, **_):
            times.append(time.perf_counter())
            return torch.zeros(ids.shape[0], dtype=torch.bool)

        ids = torch.tensor(prompts)
        start = time.perf_counter()
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([note]),
        )
        end = time.perf_counter()
        made = out[:, ids.shape[1] :].tolist()
        return {"prefill": times[0] - start, "total": end - start, "ids": made}


class JaxllmWorker:
    """This library."""

    def version(self) -> str:
        """The jax that runs it."""
        return version("jax")

    def load(self, directory: str, dtype: str) -> dict[str, Any]:
        import jaxllm as jl

        self.model = None
        self.model, _ = jl.load(directory, dtype=dtype)
        report = jl.report_bytes(self.model)
        table = next(part.weight_bytes for part in report.layers if part.name == "embedding")
        return {"weight_bytes": report.weight_bytes, "step_bytes": report.weight_bytes - table}

    def run(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        import jaxllm as jl

        start = time.perf_counter()
        outs = jl.generate(self.model, None, prompts, max_new_tokens=new, stop_tokens=(), timings=True)
        end = time.perf_counter()
        made = [out.token_ids for out in outs]
        return {"prefill": outs[0].timings.prefill_s, "total": end - start, "ids": made}


WORKERS = {"transformers": TransformersWorker, "jaxllm": JaxllmWorker}


def serve(library: str) -> None:
    """A worker's life."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    worker = WORKERS[library]()
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            answer = getattr(worker, name)(**arguments)
        except Exception as error:  # told to the parent, which stops
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(sys.argv[1])
