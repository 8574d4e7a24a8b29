"""Questions that only code answers: drawn, computed twice, checked."""
