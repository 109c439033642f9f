from tbtc.eval import cli, main  # eval.py under the name of CompressAI's script

if __name__ == "__main__":
    cli.run(main)
