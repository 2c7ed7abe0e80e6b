"""PyTorch both ways: Hugging Face's Qwen3-VL and the reference implementation of LaRA-VLA.

hf_keys.py    the two-way table of names and axes
params.py     import and export of parameters by that table
weights.py    files: safetensors (single or sharded), torch's .pt
hf_config.py  Hugging Face's config.json
convert.py    the commands `lara import` and `lara export`
golden.py     the command `lara check-golden`: our numbers against the reference's
"""
