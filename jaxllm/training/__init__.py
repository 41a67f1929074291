"""Training: any loss on any pytree (`trainer`), and the recipe of the shipped models (`pico`)."""
