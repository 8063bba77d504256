package relay

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func cacheWith(t *testing.T, images ...ImageFile) Daemon {
	list, err := json.Marshal(images)
	if err != nil {
		t.Fatal(err)
	}
	return standInFor(t, func(_ call, connection *net.UnixConn) {
		fmt.Fprintf(connection, `{"parameters":{"images":%s}}`+"\x00", list)
	})
}

func TestAViewHoldsWhatTheCacheLetsGo(t *testing.T) {
	dir := directory(t, "4", "5")
	cache := cacheWith(t,
		ImageFile{Name: "core-7.img", Bytes: 9, Path: filepath.Join(dir, "4")},
		ImageFile{Name: "pages-1.img", Bytes: 9, Path: filepath.Join(dir, "5")})
	view, err := cache.OpenView(soon(t), "web")
	if err != nil {
		t.Fatal(err)
	}
	os.RemoveAll(dir)
	path := view.Dir().Name()
	for name, want := range map[string]string{"core-7.img": "this is 4", "pages-1.img": "this is 5"} {
		if got, err := os.ReadFile(filepath.Join(path, name)); err != nil || string(got) != want {
			t.Errorf("%q: %v", got, err)
		}
	}
	if err := view.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("%v", err)
	}
}

func TestAViewOfSomethingElseIsNoneAndLeavesNothing(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	path := filepath.Join(directory(t, "4"), "4")
	for want, image := range map[string]ImageFile{
		"10 were announced":  {Name: "core-7.img", Bytes: 10, Path: path},
		"no name of a file":  {Name: "../core-7.img", Bytes: 9, Path: path},
		"no such file":       {Name: "core-7.img", Bytes: 9, Path: path + "x"},
		`".." is no name`:    {Name: "..", Bytes: 9, Path: path},
		"image  of snapshot": {Name: "", Bytes: 9, Path: path},
	} {
		if _, err := cacheWith(t, image).OpenView(soon(t), "web"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
	if left, err := os.ReadDir(os.TempDir()); err != nil || len(left) > 0 {
		t.Errorf("%v: %v", left, err)
	}
}
