"""Specialists' answers, rejected by verifiers and mixed into one data set."""
