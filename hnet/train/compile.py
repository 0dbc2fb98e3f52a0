"""later"""
def compile_blocks(model): raise NotImplementedError
