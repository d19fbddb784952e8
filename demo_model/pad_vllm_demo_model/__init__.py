"""The reward model of pad-vllm's demo, a PEFT folder without its base; ``pad_vllm.demo.smollm`` lays it out."""
