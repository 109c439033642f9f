from common import cli

from tbtc.eval import main  # eval.py under the name of CompressAI's script

if __name__ == "__main__":
    cli.run(main)
