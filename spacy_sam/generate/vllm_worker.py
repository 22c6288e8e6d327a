"""The other end of `vllm_engine`: runs one model at a time on vLLM, as it is told in lines of JSON.

The interpreter that has vLLM runs this file as a script, so nothing of the package is imported here. Questions come in on
standard input and answers go out on what was standard output, a line each; the script ends when its input does. vLLM and what it
starts write to standard error instead.
"""

import json
import os
import sys
import traceback
from typing import Any, Callable, Dict, List, Optional, TextIO

# Unless the environment says otherwise: one process, which ends as a whole; helpers that do not inherit the answers' pipe;
# warnings only; no reports to anyone.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


class Server:
    """Holds the model. Each method answers one kind of question, with what can be written as JSON."""

    def __init__(self) -> None:
        self.llm: Any = None

    def use(self, folder: str, settings: Dict[str, Any]) -> Dict[str, Any]:
        """Load a model folder; after the first one, only its weights, in place.

        folder (str): A transformers folder. Later ones differ from the first in their weights alone.
        settings (Dict[str, Any]): Arguments of `vllm.LLM`, for the first one. Without a dtype, float32 on the CPU and bfloat16
            elsewhere.
        """
        if self.llm is None:
            self.llm = _load(folder, settings)
        else:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
            self.llm.reset_prefix_cache()  # it holds keys and values of the weights before
        return {}

    def generate(self, prompts: List[Dict[str, Any]], end_ids: List[int]) -> Dict[str, Any]:
        """Complete prompts greedily.

        prompts (List[Dict[str, Any]]): Each with `ids`, its tokens; `limit`, the most tokens of the answer; `grammar`, Lark text
            or null; and `bias`, pairs of a token and what is added to its logit.
        end_ids (List[int]): Tokens that end an answer.
        RETURNS (Dict[str, Any]): `answers`, in the order given: `ids`, the end token included, and `logprobs`, natural ones of
            the model under the grammar, without the bias.
        """
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt["ids"]} for prompt in prompts],
            [_sampling(prompt, end_ids) for prompt in prompts],
            use_tqdm=False,
        )
        return {"answers": [_answer(output.outputs[0]) for output in outputs]}


def _load(folder: str, settings: Dict[str, Any]) -> Any:
    from vllm import LLM
    from vllm.platforms import current_platform

    given = {name: value for name, value in settings.items() if value is not None}
    return LLM(
        **{
            "model": folder,
            "dtype": "float32" if current_platform.is_cpu() else "bfloat16",
            "enable_prefix_caching": True,
            "structured_outputs_config": {"backend": "guidance"},
            "logprobs_mode": "raw_logprobs",  # under the grammar, without the bias
            "generation_config": "vllm",  # no penalties or temperature of the base's own
            **given,
        }
    )


def _sampling(prompt: Dict[str, Any], end_ids: List[int]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    grammar: Optional[str] = prompt["grammar"]
    return SamplingParams(
        temperature=0.0,
        max_tokens=prompt["limit"],
        logprobs=0,  # of the chosen token alone
        stop_token_ids=end_ids,
        logit_bias={token: added for token, added in prompt["bias"]} or None,
        structured_outputs=StructuredOutputsParams(grammar=grammar) if grammar is not None else None,
        detokenize=False,
    )


def _answer(output: Any) -> Dict[str, Any]:
    ids = list(output.token_ids)
    return {"ids": ids, "logprobs": [steps[token].logprob for token, steps in zip(ids, output.logprobs)]}


def serve(questions: TextIO, answers: TextIO) -> None:
    """Answer until the questions end. A question that fails is answered with its error."""
    server = Server()
    kinds: Dict[str, Callable[..., Dict[str, Any]]] = {"use": server.use, "generate": server.generate}
    for line in questions:
        question = json.loads(line)
        try:
            answer = kinds[question.pop("do")](**question)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        _write(answers, answer)


def _write(answers: TextIO, answer: Dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def main() -> None:
    """Say which vLLM is here, or why there is none, and serve."""
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    sys.path.pop(0)  # this file's folder: vLLM would find our modules in place of those of the same name
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import vllm
        from vllm import LLM  # noqa: F401  # most of what vLLM needs is imported with this
    except ImportError as error:
        _write(answers, {"missing": str(error)})
        return
    _write(answers, {"vllm": vllm.__version__})
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
