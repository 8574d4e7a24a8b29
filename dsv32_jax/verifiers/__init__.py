"""What scores an answer: rules, format, language, length, proofs, rubrics."""
