"""Measuring retrieval, BM25, fusion and reranking on collections in BEIR format. Needs the extra 'eval'."""

from __future__ import annotations

from kalm_rag.evaluation.beir import EvalSet
from kalm_rag.evaluation.metrics import RESAMPLES, paired_interval
from kalm_rag.evaluation.report import EvalReport, EvalRow, Summary, summarise
from kalm_rag.evaluation.run import evaluate

__all__ = ["RESAMPLES", "EvalReport", "EvalRow", "EvalSet", "Summary", "evaluate", "paired_interval", "summarise"]
