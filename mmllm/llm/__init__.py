"""The language model: any causal LM of transformers, frozen, with LoRA and signal tokens.

    language_model   LanguageModel: embed, forward, head, token_nll, kl_divergence
    loading          CausalLMConfig, and how it becomes a LanguageModel
    folder_checks    checks of a folder of weights before transformers opens it
    logit_check      a check that a family's logits are computed as it computes them
    auto_classes     which class of transformers reads a checkpoint, and its language part
    adapters         LoRA, by peft
    signal_tokens    the small tables of signal tokens
    kv_cache         the key-value cache of generation
    templates        chat templates
    export           a plain transformers folder

How its layers run fast is mmllm.kernels.
"""
