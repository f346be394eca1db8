"""How fast is it? Ops and whole models beside their baselines, in interleaved rounds."""
