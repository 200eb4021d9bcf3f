"""MSA in the company of others: what neighbours use, run by, turned into or read as MSA.

    layouts.py        selections in the orders of transformers, vLLM and the official kernels
    page_layouts.py   paged caches as these, FlashInfer, SGLang and TensorRT-LLM keep them
    transformers.py   Hugging Face's MiniMax-M3 on these kernels
    convert.py        Hugging Face decoders with grouped-query attention, turned into MSA

Nothing is imported here: each file needs no more than it names.
"""
