"""The reconciler: what watches, keeps and hands on, beside the engine and never in its way."""
