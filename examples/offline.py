"""The same prompt for three tastes, in one batch, without a server: ``python examples/offline.py``."""

from vllm import LLM

from pad_vllm import PAD, SamplingParams

if __name__ == "__main__":
    llm = LLM(
        "base-model",
        logits_processors=["pad_vllm:PADLogitsProcessor"],
        additional_config={"pad": "examples/pad.yaml"},
        max_model_len=1024,
    )
    tastes = [
        PAD(preference="Be concise."),
        PAD(persona="storyteller"),
        PAD(weights=[0.9, 0.1, 0.0], beta=0.8),
    ]
    question = [{"role": "user", "content": "How do I keep tomatoes fresh?"}]
    params = [SamplingParams(temperature=0, max_tokens=32, logits_processors=[taste]) for taste in tastes]
    for taste, output in zip(tastes, llm.chat([question] * len(tastes), params), strict=True):
        print(f"{taste.extra_args()}\n  {output.outputs[0].text!r}\n")
