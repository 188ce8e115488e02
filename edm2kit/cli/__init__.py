"""What several command lines compose from the rooms: options -> loaded networks -> guided denoiser -> images.

Imports from every room; only the command lines and scripts import it.
"""
