"""The paper's claims at toy scale: one trainer, one world, one protocol."""
