"""One engine of vLLM in this process's children: reads what to do as JSON from standard input,
writes a line "ANSWER ..." with JSON.

A job is {"prompts": token ids, "sampling": of SamplingParams, "lora": a folder or nothing,
"together": whether all prompts are given at once}; its answer is one row for each prompt: tokens,
text, finish_reason, log-probabilities of each of the prompt's positions.
"""

import json
import sys


def rows(outputs) -> list[dict]:
    found = []
    for output in outputs:
        made = output.outputs[0]
        spread = [
            {token: value.logprob for token, value in position.items()}
            for position in output.prompt_logprobs or ()
            if position is not None
        ]
        found.append({
            "tokens": list(made.token_ids), "text": made.text, "reason": made.finish_reason,
            "prompt_logprobs": spread, "cached": output.num_cached_tokens,
        })  # fmt: skip
    return found


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    said = json.load(sys.stdin)
    options = {"kv_cache_memory_bytes": 1 << 26, "dtype": "float32"} | said["options"]
    llm = LLM(said["model"], disable_log_stats=True, **options)
    answers = []
    for job in said["jobs"]:
        prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
        sampling = SamplingParams(**job["sampling"])
        lora = LoRARequest("adapter", 1, job["lora"]) if job.get("lora") else None
        batches = [prompts] if job.get("together", True) else [[prompt] for prompt in prompts]
        found = []
        for batch in batches:
            found += llm.generate(batch, sampling, use_tqdm=False, lora_request=lora)
        answers.append(rows(found))
    print("ANSWER " + json.dumps(answers), flush=True)


if __name__ == "__main__":
    main()
