from cifar_fastai.cli import main

if __name__ == "__main__":
    raise SystemExit(main("serve"))
