"""KV-Distill on Hugging Face models (arXiv 2503.10337): adapter folders, and the compressor that uses them."""

from kvcat_nemo.compress.kvdistill.adapter import Adapter, load_adapter, save_adapter
from kvcat_nemo.compress.kvdistill.compressor import KVDistill
from kvcat_nemo.compress.kvdistill.encode import encode

__all__ = ["Adapter", "KVDistill", "encode", "load_adapter", "save_adapter"]
