"""Evaluation of compressed caches: tasks with scores, methods side by side, honest bytes."""
