"""Training: mmengine's Runner made safe, alone or over several processes, watched and resumed."""
