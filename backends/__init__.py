"""How xKV is computed, one folder a framework."""
