"""Adapters for transformers, vLLM and other libraries.

    layouts.py        selections in the orders of transformers, vLLM and the official kernels
    page_layouts.py   paged caches in the layouts of these and of FlashInfer, SGLang, TensorRT-LLM
    vllm.py           the plug-in of vLLM; vllm_model.py and vllm_layers.py are what it registers
    sglang.py         the plug-in of SGLang; sglang_layers.py has its hooks
    engine_checks.py  what both refuse
    transformers.py   MiniMax-M3 of Hugging Face with the attention of this project
    convert.py        converts Hugging Face decoders with grouped-query attention to MSA
    index_file.py     writes and reads the index branch of a converted model
    convert_run.py    the command `msa convert`
    targets.py        functions of transformers as targets of `msa verify --target`

This file imports nothing, so that each module needs only the libraries that it uses.
"""
