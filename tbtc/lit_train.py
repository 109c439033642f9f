from tbtc.train import cli, main  # train.py under the source's name

if __name__ == "__main__":
    cli.run(main)
