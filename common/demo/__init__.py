"""A page in the browser that codes images with the bundled weights of every paper (`make demo`).

`coding.py` codes an image and measures everything that is shown; `pictures.py` and `report.py` turn
this into pictures and HTML; `page.py` is the page itself, by Gradio; `__main__.py` is the command.
"""
