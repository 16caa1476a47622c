"""Methods that mix experts on each projection: LoRAMoE and MoLA."""
