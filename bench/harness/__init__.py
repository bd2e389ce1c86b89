"""What every benchmark uses: cases, timing, the machine, its limits."""
