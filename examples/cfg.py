"""Classifier-free guidance and negative prompts: a model guided by itself, with no training. ``python examples/cfg.py
MODEL``"""

import sys

from vllm import LLM

from pad_vllm import PAD, SamplingParams

STYLE, ANTI_STYLE = "Use very simple words.", "Write like a salesman, with exclamation marks."

if __name__ == "__main__":
    model = sys.argv[1]
    llm = LLM(
        model,
        logits_processors=["pad_vllm:PADLogitsProcessor"],
        additional_config={"pad": {"reward_model": "base", "prompt_template": "{preference}\n\n{prompt}", "top_k": 40}},
        max_model_len=512,
    )
    asked = {
        "as it is": None,
        "guided by a principle": PAD(preference=STYLE, beta=2),
        "away from a negative prompt": PAD(preference=ANTI_STYLE, preference_weights=[-1], beta=1),
        "both": PAD(preference=[STYLE, ANTI_STYLE], preference_weights=[1, -0.5], beta=2),
    }
    question = [{"role": "user", "content": "What does a bank do?"}]
    params = [
        SamplingParams(temperature=0, max_tokens=60, **({} if pad is None else {"logits_processors": [pad]}))
        for pad in asked.values()
    ]
    for name, output in zip(asked, llm.chat([question] * len(params), params), strict=True):
        print(f"{name}:\n  {output.outputs[0].text.strip()}\n")
