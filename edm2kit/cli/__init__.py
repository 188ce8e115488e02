"""The commands, one module each, and what they share: options, requests for images, and folders of images.

Nothing imports a command; `console` starts them. `click_types` and `field_options` are about options;
`generation_options` turns options into a `Request`, and `generation` turns a `Request` into an engine that generates
images.
"""
