"""Engine builders: one module per engine, and the shared export, lowering and build graph."""
