"""The networks: STFT, FAVOR+ attention, Performer, masknet."""
