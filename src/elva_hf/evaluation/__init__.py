"""Evaluation: tables that anyone can check."""
