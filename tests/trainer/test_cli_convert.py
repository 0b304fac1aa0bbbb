"""`lookahead convert`: the command around lookahead/files/convert.py."""

import pytest
from lcm_lookahead.cli import main
from lcm_lookahead.lookahead.files import encoder_file

STOCK = "mini/weights/mini_ip_adapter_plus_face.safetensors"


def test_the_command_converts_and_says_what_it_wrote(tmp_path, capsys, request):
    source, target = request.config.rootpath / STOCK, tmp_path / "mine.safetensors"
    main.main(["convert", str(source), str(target)])
    out = capsys.readouterr().out
    assert f"Written: {target}" in out and encoder_file.OWN_KIND in out
    assert encoder_file.read(target).kind == encoder_file.OWN_KIND
    with pytest.raises(SystemExit, match="exists already"):
        main.main(["convert", str(source), str(target)])
