"""Drawing of address spaces: terminal, SVG and HTML, of neutral data.

Nothing here reads /proc or knows the model of an address space: what is to be drawn arrives as the objects of
`quire.pictures.model`.
"""
