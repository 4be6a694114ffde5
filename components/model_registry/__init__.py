"""Registered students: the champion, the paired test that may replace it, and data drift."""
